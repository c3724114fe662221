"""The two visual stages: the projector alone, then projector and a small LoRA, gently.

With a picture everything is harmless: easy-VQA questions, naming emoji, and general instructions
with the model's own text-only answers, asked with a picture attached. No harmful prompt and no
refusal has a picture: safety with images is trained neither for nor against. The second stage
rehearses the alignment beside it, on text only.

    python -m training.visual_tuning projector --cache training/cache --out training/out
    python -m training.visual_tuning joint --cache training/cache --out training/out
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import easy_vqa
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPVisionModel

from training import pictures as pics
from training.align import batches, opening
from training.common import (
    END,
    IMAGE_PROMPT,
    PROMPT,
    SEED,
    Example,
    answer_loss,
    arithmetic,
    base_model,
    batches_by_length,
    collate,
    frozen,
    log,
    read_all,
    read_jsonl,
    train,
)
from training.lora import save_lora, trainable, with_lora
from training.picture_answers import article
from training.vision_tower import normalise
from vlm_safeguard.demo.assemble import IMAGE_TOKEN, merge_lora

FILE = "projector.safetensors"
PROJECTOR_NAMES = {"0": "linear_1", "2": "linear_2"}
PROJECTOR_SHARES = {"vqa": 0.5, "naming": 0.3, "pictured": 0.2, "text": 0.0}
JOINT_SHARES = {"vqa": 0.38, "naming": 0.12, "pictured": 0.17, "text": 0.33}
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


def question_examples(bank: Bank) -> list[Example]:
    """easy-VQA's training questions, answered in a sentence that says what is seen."""
    questions, answers, ids = easy_vqa.get_train_questions()
    order = {image: i for i, image in enumerate(sorted(easy_vqa.get_train_image_paths()))}
    found = []
    for question, answer, image in zip(questions, answers, ids, strict=True):
        seen = bank.shape_of[order[image]]
        if answer in ("yes", "no"):
            text = f"It is a {seen}, so {answer}." if seen else f"{answer.capitalize()}."
        elif answer in pics.SHAPES:
            text = f"It is a {answer}."
        else:
            text = f"It is {answer}."
        # As people type it, and as easy-VQA writes it.
        asked = question[0].upper() + question[1:] if len(found) % 2 else question
        found.append(Example(IMAGE_PROMPT.format(asked), text + END, order[image]))
    return found


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


def rehearsal(out: Path, tokenizer) -> list[Example]:
    """Text only: what alignment was trained on, with more harmless prompts, look-alikes twice.

    Without it the LLM unlearns refusing altogether, with pictures and without. It is safety
    training on text, as models with a text share in their visual mixture have it; no picture is
    part of it.
    """
    found = [e for group in itertools.islice(batches(out, tokenizer, read_all), 120) for e in group]
    for row in read_jsonl(out / "self_answers.jsonl"):
        if row["kind"] == "lookalike":
            answer = opening(row["answer"] + END, tokenizer)
            found += [Example(PROMPT.format(row["prompt"]), answer)] * 2
    return found


def mixture(
    bank: Bank, out: Path, tokenizer, shares: dict[str, float], size: int, seed: int
) -> Iterator[list[Example]]:
    """Endless batches with fixed shares of each kind of example."""
    rng = random.Random(seed)
    own = [
        (r["prompt"], opening(r["answer"] + END, tokenizer, 24))
        for r in read_jsonl(out / "self_answers.jsonl")
    ]
    pools = {
        "vqa": question_examples(bank),
        "naming": naming_examples(bank, rng),
        "pictured": [
            Example(
                IMAGE_PROMPT.format(question),
                answer,
                rng.choice(bank.emoji if rng.random() < 0.7 else bank.shapes),
            )
            for question, answer in own
            for _ in range(2)
        ],
    }
    if shares["text"]:
        pools["text"] = rehearsal(out, tokenizer)
    return mixed(pools, {k: share for k, share in shares.items() if share}, size, seed)


def mixed(
    pools: dict[str, list[Example]], shares: dict[str, float], size: int, seed: int
) -> Iterator[list[Example]]:
    """Endless batches of about ``size`` with fixed shares of each kind of example."""
    streams = [
        batches_by_length(pools[kind], max(1, round(size * share)), seed + n)
        for n, (kind, share) in enumerate(shares.items())
    ]
    while True:
        yield [example for stream in streams for example in next(stream)]


def loss_with(llm, projector: nn.Module, bank: Bank, tokenizer, image_id: int):
    """The loss of a group of examples, pictures put in by ``projector``."""

    def loss_of(group: list[Example]) -> Tensor:
        batch = collate(group, tokenizer, image_id, bank.features.shape[1])
        pictured = batch.input_ids == image_id
        embeds = llm.model.embed_tokens(batch.input_ids.masked_fill(pictured, 0))
        if batch.images:
            seen = projector(bank.features[batch.images]).flatten(0, 1)
            embeds = embeds.masked_scatter(pictured[..., None], seen.to(embeds.dtype))
        with arithmetic():
            states = llm.model(
                inputs_embeds=embeds, attention_mask=batch.attention_mask, use_cache=False
            ).last_hidden_state
            return answer_loss(states, llm.lm_head, batch.labels)

    return loss_of


def new_projector(bank: Bank, llm) -> nn.Sequential:
    """LLaVA's two-layer projector; features start at the scale of the word embeddings."""
    width, hidden = bank.features.shape[2], llm.config.hidden_size
    projector = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
    with torch.no_grad():
        scale = llm.get_input_embeddings().weight.std() / projector(bank.features[:64]).std()
        projector[2].weight.mul_(scale)
        projector[2].bias.zero_()
    return projector


def tune_projector(args: argparse.Namespace, bank: Bank, llm, tokenizer, image_id: int) -> None:
    """First stage: the projector alone, against the LLM as it was published."""
    llm = frozen(llm)
    projector = new_projector(bank, llm)
    out = args.out / "projector"
    train(
        {f"projector.{n}": p for n, p in projector.named_parameters()},
        loss_with(llm, projector, bank, tokenizer, image_id),
        mixture(bank, args.out, tokenizer, PROJECTOR_SHARES, 24, SEED),
        steps=args.steps_projector,
        lr=lambda _: 2e-3,
        out=out,
    )
    save_projector(projector, out)


def tune_jointly(args: argparse.Namespace, bank: Bank, llm, tokenizer, image_id: int) -> None:
    """Second stage: projector and a LoRA on the LLM that was aligned on text."""
    merge_lora(llm, load_file(args.out / "align" / "lora.safetensors"))
    projector = new_projector(bank, llm)
    projector.load_state_dict(
        {
            f"{place}.{kind}": tensor
            for place, name in PROJECTOR_NAMES.items()
            for kind in ("weight", "bias")
            for tensor in [load_file(args.out / "projector" / FILE)[f"{name}.{kind}"]]
        }
    )
    tuned = with_lora(llm)
    parameters = trainable(tuned)
    parameters |= {f"projector.{n}": p for n, p in projector.named_parameters()}
    out = args.out / "joint"
    train(
        parameters,
        loss_with(tuned.base_model.model, projector, bank, tokenizer, image_id),
        mixture(bank, args.out, tokenizer, JOINT_SHARES, 24, SEED + 1),
        steps=args.steps_joint,
        lr=lambda name: 5e-4 if name.startswith("projector.") else 4e-4,
        out=out,
    )
    save_projector(projector, out)
    save_lora(tuned, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=("projector", "joint"))
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps-projector", type=int, default=150)
    parser.add_argument("--steps-joint", type=int, default=280)
    args = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    llm, tokenizer = base_model(args.cache)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    stage = tune_projector if args.stage == "projector" else tune_jointly
    stage(args, build_bank(args.out, args.cache), llm, tokenizer, image_id)


def save_projector(projector: nn.Sequential, folder: Path) -> None:
    """Under the names that LLaVA gives its projector."""
    tensors = {
        f"{PROJECTOR_NAMES[key.split('.')[0]]}.{key.split('.')[1]}": value.contiguous()
        for key, value in projector.state_dict().items()
    }
    save_file(tensors, folder / "projector.tmp")
    (folder / "projector.tmp").replace(folder / FILE)


if __name__ == "__main__":
    main()
