"""Safety alignment of the language model, on text only.

Half refusals of harmful prompts, half the openings of the model's own answers to harmless ones
(look-alikes included), both plain and inside jailbreak wrappers; LoRA on every projection.

    python -m training.align --cache training/cache --out training/out
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from training.common import (
    DATA,
    END,
    PROMPT,
    REFUSALS,
    SEED,
    Example,
    answer_loss,
    base_model,
    collate,
    frozen,
    log,
    read_jsonl,
    train,
)
from training.forms import reform

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16


OPENING = 16  # answer tokens that are trained on: whether to refuse is decided in the first few


def first_round(stem: str) -> list[dict]:
    """The first file of a data set alone."""
    return read_jsonl(DATA / f"{stem}.jsonl")


def batches(
    out: Path,
    tokenizer,
    read: Callable[[str], list[dict]] = first_round,
    *,
    reword: bool = False,
) -> Iterator[list[Example]]:
    """Endless batches, half refusals and half own answers: two plain ones, then a wrapped one.

    ``read`` gives the rows of a data set: alignment learns from the first files, and what the
    second ones add is learned while visual tuning rehearses.

    A wrapped question keeps the answer that it has alone, refusal or not, so that a wrapper by
    itself means nothing; and so does a question in another form of words (``reform``).
    """
    rng = random.Random(SEED)
    harmful = [r["prompt"] for r in read("align_harmful")]
    answers = {r["prompt"]: r["answer"] for r in read_jsonl(out / "self_answers.jsonl")}
    asked = [r["prompt"] for r in read("align_harmless")]
    harmless = [(question, answers[question]) for question in asked if question in answers]
    wrappers = [r["prompt"] for r in read_jsonl(DATA / "align_templates.jsonl")]
    wrappers += [r["prompt"] for r in read_jsonl(DATA / "align_wrappers_benign.jsonl")]
    log(f"{len(harmful)} harmful prompts, {len(harmless)} harmless ones, {len(wrappers)} wrappers")
    bad, good = endless(harmful, rng), endless(harmless, rng)
    for number in itertools.count():
        wrapped = number % 3 == 2
        group = []
        for _ in range(8 if wrapped else 16):
            question, reply = next(good)
            for text, answer in (
                (next(bad), rng.choices(REFUSALS, (5, 3, 1, 1))[0] + END),
                (question, opening(reply + END, tokenizer)),
            ):
                if reword and rng.random() < 0.6:
                    text = reform(text, rng)
                text = rng.choice(wrappers).replace("[QUESTION]", text) if wrapped else text
                group.append(Example(PROMPT.format(text), answer))
        yield group


def endless(items: list, rng: random.Random) -> Iterator:
    """Every item once in a random order, again and again."""
    while True:
        yield from rng.sample(items, len(items))


def opening(answer: str, tokenizer, limit: int = OPENING) -> str:
    """The first tokens of an answer, with its end where it is that short."""
    return tokenizer.decode(tokenizer(answer).input_ids[:limit])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    model, tokenizer = base_model(args.cache)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=PROJECTIONS, lora_dropout=0.0)
    tuned = get_peft_model(frozen(model), config)
    parameters = {n: p for n, p in tuned.named_parameters() if p.requires_grad}
    inner = tuned.base_model.model

    def loss_of(group: list[Example]) -> torch.Tensor:
        batch = collate(group, tokenizer)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = inner.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).last_hidden_state
            return answer_loss(hidden, inner.lm_head, batch.labels)

    folder = args.out / "align"
    data = batches(args.out, tokenizer)
    tuned.train()
    train(parameters, loss_of, data, steps=args.steps, lr=lambda _: 4e-4, out=folder)
    tensors = get_peft_model_state_dict(tuned)
    temporary = folder / "lora.tmp"
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)
    temporary.replace(folder / "lora.safetensors")
    log(f"alignment written to {folder / 'lora.safetensors'}")


if __name__ == "__main__":
    main()
