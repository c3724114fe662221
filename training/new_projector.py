"""A trial, not part of ``make train``: a new projector against the finished language model, frozen.

With a picture everything is harmless, and everything is about the picture: easy-VQA questions,
naming emoji, and instructions about what is shown (``training.picture_answers``). No general
question is asked beside a picture, as in the joint stage: that teaches to look past it. The
language model does not change here, so that whatever it does on text it still does. What came of
it stands in the embedded model's card; the projector is kept in ``training/trials``.

    python -m training.new_projector --cache training/cache --out training/out
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import load_file

from training.align import opening
from training.common import (
    END,
    IMAGE_PROMPT,
    SEED,
    Example,
    base_model,
    frozen,
    read_jsonl,
    train,
)
from training.picture_answers import FILE as ANSWERS
from training.visual_tuning import (
    Bank,
    build_bank,
    loss_with,
    mixed,
    naming_examples,
    new_projector,
    question_examples,
    save_projector,
)
from vlm_safeguard.demo.assemble import IMAGE_TOKEN, merge_lora

ALIGNED = ("align", "realign")
SHARES = {"vqa": 0.5, "naming": 0.25, "grounded": 0.25}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=120)
    args = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    llm, tokenizer = base_model(args.cache)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    for stage in ALIGNED:
        merge_lora(llm, load_file(args.out / stage / "lora.safetensors"))
    llm = frozen(llm)
    bank = build_bank(args.out, args.cache)
    pools = {
        "vqa": question_examples(bank),
        "naming": naming_examples(bank, random.Random(SEED)),
        "grounded": grounded_examples(bank, args.out, tokenizer),
    }
    projector = new_projector(bank, llm)
    folder = args.out / "new_projector"
    train(
        {f"projector.{n}": p for n, p in projector.named_parameters()},
        loss_with(llm, projector, bank, tokenizer, image_id),
        mixed(pools, SHARES, 24, SEED),
        steps=args.steps,
        lr=lambda _: 2e-3,
        out=folder,
    )
    save_projector(projector, folder)


if __name__ == "__main__":
    main()
