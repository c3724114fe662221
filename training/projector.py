"""LLaVA's projector, trained against the frozen language model, on benign pictures and requests.

First the projector's hidden units learn to name what is shown, one unit for each name, and the
second layer begins with the word embeddings of the names: many pictures, no pass of the language
model. Then the language model answers beside a picture: general requests as it answers them as
text, instructions about what is shown as it answers them about the name (``training.answers``),
names of what is shown, and easy-VQA questions. The hidden units go on learning names beside it.

Nothing here is harmful and nothing is refused: safety beside pictures is trained neither in nor
out. The language model's own weights are never changed.

    python -m training.projector --cache training/cache --out training/out
"""

from __future__ import annotations

import argparse
import math
import random
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import easy_vqa
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionModel, DynamicCache

from training import pictures as pics
from training.answers import FILE as ANSWERS
from training.answers import answered, article
from training.checkpoints import fingerprint, load_checkpoint, save_checkpoint
from training.common import (
    END,
    SEED,
    SYSTEM,
    base_model,
    log,
    read_jsonl,
    stage,
    stage_parser,
    timed,
)
from training.package_weights import packaged_tower
from training.vision_tower import normalise
from vlm_safeguard.embedded.assemble import MODELS, PROJECTOR, TOWER

STATE = "train_state.safetensors"
# Examples of each kind in a step; each kind has the same weight in the loss.
STEP = {"general": 4, "about": 4, "naming": 12, "vqa": 10}
ANSWER_TOKENS = 24
EMOJI_VARIANTS = 8
PEAK_RATE = 2e-3
CYCLE = 80  # steps from one start of the schedule to the next
CYCLES = {"embedded": 4, "embedded-1.5b": 2}  # a step of the larger one takes longer
NAMED = 192  # pictures that the hidden units name in each step
NAME_STEPS, NAME_RATE, NAME_WEIGHT = 600, 3e-3, 0.1
# Projected pictures begin about as long as word embeddings: longer ones drown what the language
# model's lower layers add to them, and it cannot say what is shown.
SCALE = 1 / 64
WORD_LENGTH = 0.035  # of a name's embedding, for each unit of its hidden activation
CHECKPOINT_EVERY = 10
PREFIX = SYSTEM + "<|im_start|>user\n"
NAMING = (
    ("What is in this picture?", "The picture shows {}."),
    ("What do you see in the image?", "The image shows {}."),
    ("Describe the picture.", "The picture shows {}."),
    ("What does this image show?", "The image shows {}."),
    ("Name the thing in the photo.", "The photo shows {}."),
    ("Tell me what this is.", "This is {}."),
)


@dataclass(frozen=True)
class Bank:
    """Patch features (n, tokens, width) of the frozen tower, and the name of what each picture
    shows: "red circle", "cat", "blank"; "" where easy-VQA leaves shape or colour open."""

    features: Tensor
    name: list[str]
    shapes: range
    emoji: range
    blank: range

    def named(self) -> dict[str, list[int]]:
        """The pictures of each name."""
        places: dict[str, list[int]] = defaultdict(list)
        for place, name in enumerate(self.name):
            if name:
                places[name].append(place)
        return places


@dataclass(frozen=True)
class Example:
    """Token ids of one request and its answer, and the picture (a place in the bank) beside it."""

    question: list[int]
    answer: list[int]
    picture: int
    kind: str


@torch.inference_mode()
def build_bank(tower: CLIPVisionModel, cache: Path) -> Bank:
    """Features of every training picture: easy-VQA, augmented emoji, flat ones."""
    generator = torch.Generator().manual_seed(SEED)
    concepts = pics.load_concepts()
    emoji = pics.load_emoji(concepts, cache).of(held_out=False)
    shapes, _ = pics.load_shapes()
    parts: list[Tensor] = []

    def run(pixels: Tensor) -> None:
        parts.append(tower(pixel_values=normalise(pixels)).last_hidden_state[:, 1:])

    for start in range(0, len(shapes.rgb), 256):
        run(pics.plain_shapes(shapes.rgb[start : start + 256]))
    for _ in range(EMOJI_VARIANTS):
        for start in range(0, len(emoji.rgba), 256):
            run(pics.augmented_emoji(emoji.rgba[start : start + 256], generator))
    run(pics.blanks(96, generator))
    names = []
    for shape, colour in zip(shapes.shape.tolist(), shapes.colour.tolist(), strict=True):
        known = pics.IGNORE not in (shape, colour)
        names.append(f"{pics.COLOURS[colour]} {pics.SHAPES[shape]}" if known else "")
    names += [concepts[i].name for i in emoji.concept.tolist()] * EMOJI_VARIANTS
    names += ["blank"] * 96
    features = torch.cat(parts)
    first, second = len(shapes.rgb), len(shapes.rgb) + EMOJI_VARIANTS * len(emoji.rgba)
    log(f"{len(features)} pictures, {features.shape[1]} tokens each")
    return Bank(features, names, range(first), range(first, second), range(second, len(features)))


class Projector(nn.Module):
    """LLaVA's two-layer projector. Its output is scaled by ``SCALE``, which ``save`` puts into the
    second layer; the first hidden units stand for ``names``, the others have torch's own start.

    Args:
        width: of the tower's features.
        names: (n, hidden), the mean word embedding of each name.
    """

    def __init__(self, width: int, names: Tensor) -> None:
        super().__init__()
        hidden = names.shape[1]
        self.linear_1, self.linear_2 = nn.Linear(width, hidden), nn.Linear(hidden, hidden)
        words = WORD_LENGTH / SCALE * F.normalize(names, dim=1)
        with torch.no_grad():
            self.linear_2.weight[:, : len(names)] = words.T
            self.linear_2.bias.zero_()

    def forward(self, features: Tensor) -> Tensor:
        """Patch features (..., width) as tokens (..., hidden)."""
        return SCALE * self.linear_2(F.gelu(self.linear_1(features)))


class NameLoss:
    """Teaches the hidden units of a projector to name what is shown, one unit for each name.

    The loss is the cross-entropy over names of the units' mean over patches, and ten times the
    binary one, which makes the units of other names negative: GELU then leaves them out.
    """

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self.names = sorted(bank.named())
        number = {name: n for n, name in enumerate(self.names)}
        self.known = torch.tensor([n for n, name in enumerate(bank.name) if name])
        self.labels = torch.tensor([number[bank.name[n]] for n in self.known.tolist()])
        emoji = torch.isin(self.known, torch.tensor(bank.emoji))
        self.weights = torch.where(emoji, 0.7 / emoji.sum(), 0.3 / (~emoji).sum())
        self.generator = torch.Generator()

    def __call__(self, projector: Projector, step: int) -> tuple[Tensor, Tensor]:
        """The loss over a step's draw of pictures, and the share whose own unit is highest."""
        self.generator.manual_seed(SEED + step)
        drawn = torch.multinomial(self.weights, NAMED, generator=self.generator)
        features = self.bank.features[self.known[drawn]]
        noise = torch.randn(features.shape, generator=self.generator)
        hidden = projector.linear_1(features + 0.1 * features.std() * noise)
        units, labels = hidden[..., : len(self.names)].mean(1), self.labels[drawn]
        own = F.one_hot(labels, len(self.names)).to(units.dtype)
        apart = F.binary_cross_entropy_with_logits(units, own, pos_weight=units.new_tensor(20.0))
        loss = F.cross_entropy(units, labels) + 10 * apart
        return loss, (units.argmax(1) == labels).float().mean()


def learn_names(projector: Projector, name_loss: NameLoss) -> None:
    """Train the first layer on names alone: AdamW, warm-up and a linear decay."""
    optimizer = torch.optim.AdamW(projector.linear_1.parameters(), weight_decay=0.0)
    for step in range(NAME_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = NAME_RATE * min(1.0, (step + 1) / 20) * (1 - step / NAME_STEPS)
        loss, named = name_loss(projector, -1 - step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 100 == 0:
            log(f"names {step + 1}/{NAME_STEPS}: loss {loss.item():.2f}; named {named:.0%}")


# -- examples ------------------------------------------------------------------------------------


def examples(bank: Bank, answers: Path, tokenizer: Any, rng: random.Random) -> dict[str, list]:
    """Every example of each kind."""
    found: dict[str, list] = {kind: [] for kind in STEP}

    def example(kind: str, question: str, answer: str, place: int, whole: bool = True) -> None:
        ids = tokenizer(answer).input_ids[:ANSWER_TOKENS]
        if whole and len(ids) < ANSWER_TOKENS:
            ids = ids + tokenizer(END).input_ids
        asked = f"\n{question}{END}\n<|im_start|>assistant\n"
        found[kind].append(Example(tokenizer(asked).input_ids, ids, place, kind))

    places = bank.named()
    kinds = (bank.emoji, bank.emoji, bank.shapes, bank.blank)
    rows = [row for row in read_jsonl(answers) if answered(row)]
    for row in rows:
        where = places[row["thing"]] if row["kind"] == "about" else rng.choice(kinds)
        question = row["asked"] or row["prompt"]
        example(row["kind"], question, row["answer"], rng.choice(where), row["whole"])
    drawn = [*rng.sample(bank.emoji, 4000), *rng.sample(bank.shapes, 600)]
    for place in drawn:
        if bank.name[place]:
            question, reply = rng.choice(NAMING)
            example("naming", question, reply.format(article(bank.name[place])), place)
    for place in list(bank.blank) * 4:
        example("naming", rng.choice(NAMING)[0], "The picture is blank.", place)
    for question, answer, place in _vqa_questions(bank):
        if bank.name[place]:
            reply = _sentence(question, answer, bank.name[place])
            example("vqa", question, reply, place)
    return found


def _vqa_questions(bank: Bank) -> Iterator[tuple[str, str, int]]:
    """easy-VQA's training questions, every other one as people type it."""
    asked, answers, ids = easy_vqa.get_train_questions()
    order = {image: i for i, image in enumerate(sorted(easy_vqa.get_train_image_paths()))}
    for n, (question, answer, image) in enumerate(zip(asked, answers, ids, strict=True)):
        text = question[0].upper() + question[1:] if n % 2 else question
        yield text, answer, bank.shapes[order[image]]


def _sentence(question: str, answer: str, seen: str) -> str:
    """An answer in a sentence that says what is seen first; each word follows from those before.

    Of "Is there not a teal shape?" beside a red circle: "The image shows a red circle, not a teal
    shape, so yes."
    """
    colour, shape = seen.split()
    if answer not in ("yes", "no"):
        return f"The {shape} is {colour}." if answer == colour else f"The shape is a {shape}."
    [asked] = {*pics.SHAPES, *pics.COLOURS} & set(re.findall(r"[a-z]+", question.lower()))
    thing = asked if asked in pics.SHAPES else f"{asked} shape"
    missing = "" if asked in (colour, shape) else "not "
    return f"The image shows a {seen}, {missing}a {thing}, so {answer}."


def batches(pools: dict[str, list], seed: int) -> Iterator[list[Example]]:
    """Endless steps, each with its share of every kind, in a seeded order."""
    streams = [
        _shuffled(pools[kind], count, seed + n) for n, (kind, count) in enumerate(STEP.items())
    ]
    while True:
        yield [example for stream in streams for example in next(stream)]


def _shuffled(pool: list[Example], count: int, seed: int) -> Iterator[list[Example]]:
    rng = random.Random(seed)
    order: list[Example] = []
    while True:
        if len(order) < count:
            order = rng.sample(pool, len(pool))
        yield [order.pop() for _ in range(count)]


# -- instruction tuning --------------------------------------------------------------------------


class PictureLoss:
    """The loss of a batch: mean over kinds, over their examples, and over an answer's tokens.

    What all prompts begin with (the system prompt) is run once; its keys and values are reused.
    """

    def __init__(self, llm: nn.Module, projector: nn.Module, bank: Bank, tokenizer: Any) -> None:
        self.llm, self.projector, self.bank = llm, projector, bank
        self.pad = tokenizer.pad_token_id
        self.recent: dict[str, list[float]] = {kind: [] for kind in STEP}  # since the last log
        begin = torch.tensor([tokenizer(PREFIX).input_ids])
        self.begin = begin.shape[1]
        with torch.no_grad():
            prefix = DynamicCache()
            llm.model(begin, past_key_values=prefix, use_cache=True)
        self.prefix = [(layer.keys, layer.values) for layer in prefix.layers]

    def __call__(self, batch: list[Example]) -> Tensor:
        batch = sorted(batch, key=lambda e: len(e.question) + len(e.answer))
        cut = STEP["naming"] + STEP["vqa"]  # short ones and long ones apart: less padding
        return self._sum(batch[:cut]) + self._sum(batch[cut:])

    def _sum(self, batch: list[Example]) -> Tensor:
        tokens = self.bank.features.shape[1]
        rows = [example.question + example.answer for example in batch]
        width = max(map(len, rows))
        ids = torch.tensor([row + [self.pad] * (width - len(row)) for row in rows])
        told = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        seen = self.projector(self.bank.features[[example.picture for example in batch]])
        words = self.llm.model.embed_tokens(ids)
        embeds = torch.cat([seen.to(words.dtype), words], 1)
        mask = torch.cat([told.new_ones(len(batch), self.begin + tokens), told], 1)
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self.prefix):
            many = (len(batch), -1, -1, -1)
            cache.update(keys.expand(many), values.expand(many), layer)
        states = self.llm.model(
            inputs_embeds=embeds, attention_mask=mask, past_key_values=cache, use_cache=True
        ).last_hidden_state
        row, column, wanted = [], [], []
        for n, example in enumerate(batch):
            first = tokens + len(example.question)
            for place, token in enumerate(example.answer):
                row.append(n)
                column.append(first + place - 1)
                wanted.append(token)
        logits = self.llm.lm_head(states[row, column]).float()
        losses = F.cross_entropy(logits, torch.tensor(wanted), reduction="none")
        total, begin = losses.new_zeros(()), 0
        for example in batch:
            own = losses[begin : begin + len(example.answer)].mean()
            total = total + own / (len(STEP) * STEP[example.kind])
            self.recent[example.kind].append(own.item())
            begin += len(example.answer)
        return total


def tune(
    projector: Projector,
    loss_of: PictureLoss,
    name_loss: NameLoss,
    data: Iterator[list[Example]],
    steps: int,
    out: Path,
    expected: str,
) -> None:
    """AdamW with warm-up and cosine decay, begun anew each ``CYCLE``; resumes from ``out`` and
    keeps every checkpoint. ``expected``: what a checkpoint must agree with."""
    optimizer = torch.optim.AdamW(projector.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    first = load_checkpoint(out / STATE, projector, [optimizer], expected).get("step", 0)
    if first > steps:
        raise SystemExit(
            f"{out / STATE} is at step {first} already: ask for as many, or delete it to begin anew"
        )
    if first:
        log(f"resumed at step {first}")
    else:
        learn_names(projector, name_loss)
    for _ in range(first):
        next(data)
    began = time.monotonic()
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * _schedule(step % CYCLE)
        unnamed, named = name_loss(projector, step)
        (loss_of(next(data)) + NAME_WEIGHT * unnamed).backward()
        nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 5 == 0:
            pace = (time.monotonic() - began) / (step + 1 - first)
            means = {kind: sum(found) / len(found) for kind, found in loss_of.recent.items()}
            told = ", ".join(f"{kind} {mean:.2f}" for kind, mean in means.items())
            log(f"step {step + 1}/{steps} loss: {told}; named {named:.0%}; {pace:.1f} s/step")
            loss_of.recent = {kind: [] for kind in STEP}
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
            progress = {"fingerprint": expected, "step": step + 1}
            save_checkpoint(out / STATE, projector, [optimizer], progress)
            save(projector, out / f"step-{step + 1}" / PROJECTOR)


def _schedule(step: int, warmup: int = 5) -> float:
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / CYCLE))


def save(projector: Projector, path: Path) -> None:
    """Write the projector as LLaVA's, which has no scale of its own."""
    tensors = {
        name: SCALE * value if name.startswith("linear_2") else value.clone()
        for name, value in projector.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pics.write_via_rename(path, lambda target: save_file(tensors, target))


def made_from(args: argparse.Namespace) -> str:
    """What a checkpoint must agree with: the settings and the results of the stages before."""
    settings = [
        *(SEED, PREFIX, END, STEP, ANSWER_TOKENS, EMOJI_VARIANTS, NAMING, WORD_LENGTH, SCALE),
        *(PEAK_RATE, CYCLE, NAMED, NAME_STEPS, NAME_RATE, NAME_WEIGHT),
        *(pics.emoji_digest(pics.load_concepts()), args.model, args.dtype),
    ]
    tower = MODELS[args.model].resource(TOWER)
    return fingerprint(settings, [args.out / ANSWERS, tower])


def main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument("--steps", type=int, default=0, help="by default those of the model")
    args = stage(parser)
    steps = args.steps or CYCLES[args.model] * CYCLE
    llm, tokenizer = base_model(args)
    bank = build_bank(packaged_tower(MODELS[args.model]), args.cache)
    name_loss = NameLoss(bank)
    words = llm.get_input_embeddings().weight.float()
    ids = [tokenizer(" " + name).input_ids for name in name_loss.names]
    names = torch.stack([words[each].mean(0) for each in ids])
    projector = Projector(bank.features.shape[2], names)
    folder = args.out / "projector"
    pools = examples(bank, args.out / ANSWERS, tokenizer, random.Random(SEED))
    log(", ".join(f"{len(pool)} {kind}" for kind, pool in pools.items()))
    loss_of = PictureLoss(llm, projector, bank, tokenizer)
    data = batches(pools, SEED)
    tune(projector, loss_of, name_loss, data, steps, folder, made_from(args))
    save(projector, folder / PROJECTOR)


if __name__ == "__main__":
    with timed("projector"):
        main()
