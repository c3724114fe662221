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

from training.common import (
    DATA,
    END,
    PROMPT,
    REFUSALS,
    SEED,
    Example,
    base_model,
    log,
    read_jsonl,
    train,
)
from training.forms import reform
from training.lora import save_lora, text_loss, trainable, with_lora

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
    tuned = with_lora(model)
    tuned.train()
    train(
        trainable(tuned),
        text_loss(tuned, tokenizer),
        batches(args.out, tokenizer),
        steps=args.steps,
        lr=lambda _: 4e-4,
        out=args.out / "align",
    )
    save_lora(tuned, args.out / "align")


if __name__ == "__main__":
    main()
