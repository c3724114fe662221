"""The visual stage: LLaVA's projector, trained alone against the language model of the joint stage.

With a picture everything is harmless, and everything is about the picture: easy-VQA questions,
naming emoji, and instructions about what is shown (``training.picture_answers``). No harmful
prompt and no refusal has a picture, so safety with images is trained neither for nor against. The
language model is frozen: what it does on text it still does afterwards. General questions are not
asked beside a picture, which would teach to look past it.

    python -m training.projector --cache training/cache --out training/out
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import easy_vqa
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPVisionModel

from training import pictures as pics
from training.align import opening
from training.common import (
    END,
    IMAGE_PROMPT,
    SEED,
    Example,
    answer_loss,
    arithmetic,
    base_model,
    batches_by_length,
    collate,
    frozen,
    log,
    read_jsonl,
    stage,
    train,
)
from training.lora import FILE as LORA
from training.picture_answers import FILE as ANSWERS
from training.picture_answers import article
from training.vision_tower import normalise
from vlm_safeguard.embedded.assemble import IMAGE_TOKEN, merge_lora

FILE = "projector.safetensors"
PROJECTOR_NAMES = {"0": "linear_1", "2": "linear_2"}  # ours -> LLaVA's
SHARES = {"vqa": 0.5, "naming": 0.25, "grounded": 0.25}
EMOJI_VARIANTS = 4
NAMING = (
    ("What is in this picture?", "It is {}."),
    ("What do you see in the image?", "I see {}."),
    ("Describe the picture.", "The picture shows {}."),
    ("What does this image show?", "It shows {}."),
    ("Name the thing in the photo.", "It is {}."),
    ("Tell me what this is.", "This is {}."),
)


@dataclass(frozen=True)
class Bank:
    """Patch features (n, tokens, width) of the frozen tower, and what each picture shows."""

    features: Tensor
    shapes: range
    emoji: range
    blank: range
    concept: list[str]  # one name per emoji picture
    shape_of: list[str]  # "gray rectangle" per easy-VQA picture, "" where unknown


@torch.inference_mode()
def build_bank(out: Path, cache: Path) -> Bank:
    """Features of every training picture: easy-VQA, augmented emoji, a few blank ones."""
    tower = CLIPVisionModel.from_pretrained(out / "vision_tower").eval()
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
    named = []
    for shape, colour in zip(shapes.shape.tolist(), shapes.colour.tolist(), strict=True):
        known = pics.IGNORE not in (shape, colour)
        named.append(f"{pics.COLOURS[colour]} {pics.SHAPES[shape]}" if known else "")
    features = torch.cat(parts)
    first, second = len(shapes.rgb), len(shapes.rgb) + EMOJI_VARIANTS * len(emoji.rgba)
    log(f"{len(features)} pictures, {features.shape[1]} tokens each")
    return Bank(
        features,
        range(first),
        range(first, second),
        range(second, len(features)),
        [concepts[i].name for i in emoji.concept.tolist()] * EMOJI_VARIANTS,
        named,
    )


def questions(bank: Bank) -> Iterator[tuple[str, str, int]]:
    """easy-VQA's training questions, their answers, and which picture of the bank they are about:
    every other one as people type it, the others as easy-VQA writes it."""
    asked, answers, ids = easy_vqa.get_train_questions()
    order = {image: i for i, image in enumerate(sorted(easy_vqa.get_train_image_paths()))}
    for n, (question, answer, image) in enumerate(zip(asked, answers, ids, strict=True)):
        text = question[0].upper() + question[1:] if n % 2 else question
        yield text, answer, bank.shapes[order[image]]


def sentence(answer: str, seen: str) -> str:
    """An answer in a sentence; of yes and no one that says what is seen, where that is known."""
    if answer in ("yes", "no"):
        return f"It is a {seen}, so {answer}." if seen else f"{answer.capitalize()}."
    return f"It is a {answer}." if answer in pics.SHAPES else f"It is {answer}."


def question_examples(bank: Bank) -> list[Example]:
    """easy-VQA's training questions, answered in a sentence that says what is seen."""
    return [
        Example(IMAGE_PROMPT.format(question), sentence(answer, bank.shape_of[place]) + END, place)
        for question, answer, place in questions(bank)
    ]


def naming_examples(bank: Bank, rng: random.Random) -> list[Example]:
    """What emoji, shapes and blank pictures show."""
    found = []
    for place, name in zip(bank.emoji, bank.concept, strict=True):
        question, reply = rng.choice(NAMING)
        text = reply.format(article(name)) + END
        found.append(Example(IMAGE_PROMPT.format(question), text, place))
    for place in rng.sample(list(bank.shapes), 1200):
        if bank.shape_of[place]:
            question, reply = rng.choice(NAMING)
            text = reply.format(article(bank.shape_of[place])) + END
            found.append(Example(IMAGE_PROMPT.format(question), text, place))
    for place in bank.blank:
        question, _ = rng.choice(NAMING)
        found.append(Example(IMAGE_PROMPT.format(question), "The picture is blank." + END, place))
    return found


def grounded_examples(bank: Bank, out: Path, tokenizer) -> list[Example]:
    """Instructions about the thing in the picture, see ``training.picture_answers``."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, name in zip(bank.emoji, bank.concept, strict=True):
        places[name].append(place)
    for place in bank.shapes:
        places[bank.shape_of[place]].append(place)
    rng = random.Random(SEED)
    return [
        Example(
            IMAGE_PROMPT.format(row["asked"]),
            opening(row["answer"] + END, tokenizer, 24),
            rng.choice(places[row["thing"]]),
        )
        for row in read_jsonl(out / ANSWERS)
        for _ in range(3)
    ]


def mixture(bank: Bank, out: Path, tokenizer, size: int, seed: int) -> Iterator[list[Example]]:
    """Endless batches of about ``size`` with fixed shares of each kind of example."""
    pools = {
        "vqa": question_examples(bank),
        "naming": naming_examples(bank, random.Random(seed)),
        "grounded": grounded_examples(bank, out, tokenizer),
    }
    return together([(pools[kind], round(size * share)) for kind, share in SHARES.items()], seed)


def together(pools: Sequence[tuple[list[Example], int]], seed: int) -> Iterator[list[Example]]:
    """Endless batches with so many examples of each pool."""
    streams = [batches_by_length(pool, size, seed + n) for n, (pool, size) in enumerate(pools)]
    while True:
        yield [example for stream in streams for example in next(stream)]


def loss_with(
    llm: nn.Module, projector: nn.Module, bank: Bank, tokenizer, image_id: int
) -> Callable[[list[Example]], Tensor]:
    """The loss of a group of examples, pictures put in by ``projector``."""

    def loss_of(group: list[Example]) -> Tensor:
        batch = collate(group, tokenizer, image_id, bank.features.shape[1])
        pictured = batch.input_ids == image_id
        embeds = llm.model.embed_tokens(batch.input_ids.masked_fill(pictured, 0))
        seen = projector(bank.features[batch.images]).flatten(0, 1)
        embeds = embeds.masked_scatter(pictured[..., None], seen.to(embeds.dtype))
        with arithmetic():
            states = llm.model(
                inputs_embeds=embeds, attention_mask=batch.attention_mask, use_cache=False
            ).last_hidden_state
            return answer_loss(states, llm.lm_head, batch.labels)

    return loss_of


def new_projector(bank: Bank, llm: nn.Module) -> nn.Sequential:
    """LLaVA's two-layer projector; features start at the scale of the word embeddings."""
    width, hidden = bank.features.shape[2], llm.config.hidden_size
    projector = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
    with torch.no_grad():
        scale = llm.get_input_embeddings().weight.std() / projector(bank.features[:64]).std()
        projector[2].weight.mul_(scale)
        projector[2].bias.zero_()
    return projector


def load_projector(bank: Bank, llm: nn.Module, folder: Path) -> nn.Sequential:
    """The projector that ``save_projector`` wrote to ``folder``."""
    projector = new_projector(bank, llm)
    tensors = load_file(folder / FILE)
    projector.load_state_dict(
        {
            f"{number}.{part}": tensors[f"{name}.{part}"]
            for number, name in PROJECTOR_NAMES.items()
            for part in ("weight", "bias")
        }
    )
    return projector


def save_projector(projector: nn.Sequential, folder: Path) -> None:
    """Under the names that LLaVA gives its projector."""
    tensors = {
        f"{PROJECTOR_NAMES[key.split('.')[0]]}.{key.split('.')[1]}": value.contiguous()
        for key, value in projector.state_dict().items()
    }
    save_file(tensors, folder / "projector.tmp")
    (folder / "projector.tmp").replace(folder / FILE)


def base_with_pictures(cache: Path) -> tuple[nn.Module, object, int]:
    """The base model, its tokenizer with a token for pictures, and that token's id."""
    llm, tokenizer = base_model(cache)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    return llm, tokenizer, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)


def main() -> None:
    args = stage(__doc__, steps=360)
    llm, tokenizer, image_id = base_with_pictures(args.cache)
    merge_lora(llm, load_file(args.out / "joint" / LORA))
    llm = frozen(llm)
    bank = build_bank(args.out, args.cache)
    projector = new_projector(bank, llm)
    folder = args.out / "projector"
    train(
        {f"projector.{n}": p for n, p in projector.named_parameters()},
        loss_with(llm, projector, bank, tokenizer, image_id),
        mixture(bank, args.out, tokenizer, 24, SEED),
        steps=args.steps,
        lr=lambda _: 2e-3,
        out=folder,
    )
    save_projector(projector, folder)


if __name__ == "__main__":
    main()
