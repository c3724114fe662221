"""Safety alignment of the language model, on text only.

Half refusals of harmful prompts, half the openings of the model's own answers to harmless ones
(look-alikes included), both plain and inside wrappers; LoRA on every projection.

    python -m training.align --cache training/cache --out training/out
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

from training.common import (
    END,
    PROMPT,
    REFUSALS,
    SEED,
    Example,
    base_model,
    log,
    read_all,
    read_jsonl,
    stage,
    train,
)
from training.forms import reform
from training.lora import save_lora, text_loss, trainable, with_lora

OPENING = 16  # answer tokens that are trained on: whether to refuse is decided in the first few
PAIRS = 16  # harmful and harmless prompts of a plain step; a wrapped one takes half as many
REWORDED = 0.5  # share of prompts that are asked in another form of words


def batches(
    stems: tuple[str, ...], out: Path, tokenizer, rng: random.Random
) -> Iterator[list[Example]]:
    """Endless batches, half refusals and half own answers: two plain ones, then a wrapped one.

    A wrapped question keeps the answer that it has alone, refusal or not, so that a wrapper by
    itself means nothing; and so does a question in another form of words (``reform``).

    Args:
        stems: names that the data files begin with.
    """
    harmful = [r["prompt"] for stem in stems for r in read_all(f"{stem}_harmful")]
    asked = [r["prompt"] for stem in stems for r in read_all(f"{stem}_harmless")]
    answers = {r["prompt"]: r["answer"] for r in read_jsonl(out / "self_answers.jsonl")}
    harmless = [(question, answers[question]) for question in asked if question in answers]
    wrappers = [r["prompt"] for r in read_all("align_templates") + read_all("align_wrappers")]
    log(f"{len(harmful)} harmful prompts, {len(harmless)} harmless ones, {len(wrappers)} wrappers")
    bad, good = endless(harmful, rng), endless(harmless, rng)
    around = endless(wrappers, rng)
    for number in itertools.count():
        wrapped = number % 3 == 2
        group = []
        for _ in range(PAIRS // 2 if wrapped else PAIRS):
            question, reply = next(good)
            for text, answer in (
                (next(bad), rng.choices(REFUSALS, (5, 3, 1, 1))[0] + END),
                (question, opening(reply + END, tokenizer)),
            ):
                if rng.random() < REWORDED:
                    text = reform(text, rng)
                text = next(around).replace("[QUESTION]", text) if wrapped else text
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
    args = stage(__doc__, steps=600)
    model, tokenizer = base_model(args.cache)
    tuned = with_lora(model)
    tuned.train()
    folder = args.out / "align"
    train(
        trainable(tuned),
        text_loss(tuned, tokenizer),
        batches(("align",), args.out, tokenizer, random.Random(SEED)),
        steps=args.steps,
        lr=lambda _: 4e-4,
        out=folder,
    )
    save_lora(tuned, folder)


if __name__ == "__main__":
    main()
