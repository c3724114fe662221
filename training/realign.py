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
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from training.align import PROJECTIONS, batches
from training.common import (
    SEED,
    Example,
    answer_loss,
    base_model,
    collate,
    frozen,
    log,
    read_all,
    train,
)
from training.visual_tuning import RANK
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
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=PROJECTIONS, lora_dropout=0.0)
    tuned = get_peft_model(frozen(llm), config)
    set_peft_model_state_dict(tuned, load_file(args.out / "joint" / "lora.safetensors"))
    inner = tuned.base_model.model

    def loss_of(group: list[Example]) -> torch.Tensor:
        batch = collate(group, tokenizer)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = inner.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).last_hidden_state
            return answer_loss(hidden, inner.lm_head, batch.labels)

    out = args.out / "realign"
    train(
        {n: p for n, p in tuned.named_parameters() if p.requires_grad},
        loss_of,
        batches(args.out, tokenizer, weighted, reword=True),
        steps=args.steps,
        lr=lambda _: 4e-4,
        out=out,
    )
    tensors = {k: v.contiguous() for k, v in get_peft_model_state_dict(tuned).items()}
    save_file(tensors, out / "lora.tmp")
    (out / "lora.tmp").replace(out / "lora.safetensors")
    log(f"text alignment of the tuned model written to {out}")


if __name__ == "__main__":
    main()
