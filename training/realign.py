"""Align the visually tuned language model once more, on text only.

Visual tuning wears refusals away, on text too. This last short stage carries on with its LoRA on
the alignment's prompts of all rounds, look-alikes twice, in many forms of words; no picture is part
of it.

    python -m training.realign --cache training/cache --out training/out
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file

from training.align import batches
from training.common import SEED, base_model, read_all, train
from training.lora import save_lora, text_loss, trainable, with_lora
from vlm_safeguard.demo.assemble import merge_lora


def weighted(stem: str) -> list[dict]:
    """All rows of a data set, look-alikes twice."""
    rows = read_all(stem)
    return rows + [row for row in rows if row.get("kind") == "lookalike"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=180)
    args = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    llm, tokenizer = base_model(args.cache)
    merge_lora(llm, load_file(args.out / "align" / "lora.safetensors"))
    tuned = with_lora(llm)
    set_peft_model_state_dict(tuned, load_file(args.out / "joint" / "lora.safetensors"))
    train(
        trainable(tuned),
        text_loss(tuned, tokenizer),
        batches(args.out, tokenizer, weighted, reword=True),
        steps=args.steps,
        lr=lambda _: 4e-4,
        out=args.out / "realign",
    )
    save_lora(tuned, args.out / "realign")


if __name__ == "__main__":
    main()
