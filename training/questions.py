"""The last stage: yes-or-no questions about what is seen, answered step by step.

Two thirds of easy-VQA's questions are answered yes or no, half of them with a negation, and in four
of five what is asked about is not there: a model that looks at the negation alone, never at the
picture, gets most of them right, and so it did after the stages before. Here the answer says first
whether the thing is there ("It is a red circle: not teal, so no."), and both cases are as frequent.
Language model and projector go on together from where they were; the alignment is rehearsed, on
text, and naming and instructions about pictures beside it.

    python -m training.questions --cache training/cache --out training/out
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file

from training import pictures as pics
from training.align import batches
from training.common import END, IMAGE_PROMPT, SEED, Example, batches_by_length, train
from training.joint import STEMS, loss_of_both
from training.lora import FILE as LORA
from training.lora import save_lora, text_loss, trainable, with_lora
from training.projector import (
    Bank,
    base_with_pictures,
    build_bank,
    grounded_examples,
    load_projector,
    loss_with,
    naming_examples,
    open_questions,
    questions,
    save_projector,
)

FOLDER = "questions"
ASKED = 12  # yes-or-no questions of each kind in a step: about what is there, and what is not
OPEN, NAMING, GROUNDED = 6, 4, 4
TEXT = 12  # prompts without a picture in a step, half of them refused


def yes_or_no(bank: Bank) -> tuple[list[Example], list[Example]]:
    """easy-VQA's yes-or-no questions about what the picture shows, and about what it does not."""
    there, absent = [], []
    for question, answer, place in questions(bank):
        seen = bank.shape_of[place]
        if answer not in ("yes", "no") or not seen:
            continue
        words = re.findall(r"[a-z]+", question.lower())
        asked = next(word for word in words if word in pics.SHAPES or word in pics.COLOURS)
        shown = asked in seen.split()
        said = asked if shown else f"not {asked}"
        text = f"It is a {seen}: {said}, so {answer}." + END
        kind = there if shown else absent
        kind.append(Example(IMAGE_PROMPT.format(question), text, place))
    return there, absent


def steps(bank: Bank, out: Path, tokenizer) -> Iterator[list[Example]]:
    """Endless steps of all that this stage trains and rehearses."""
    there, absent = yes_or_no(bank)
    pools = (
        (there, ASKED),
        (absent, ASKED),
        (open_questions(bank), OPEN),
        (naming_examples(bank, random.Random(SEED)), NAMING),
        (grounded_examples(bank, out, tokenizer), GROUNDED),
    )
    streams = [batches_by_length(pool, size, SEED + n) for n, (pool, size) in enumerate(pools)]
    for text in batches(STEMS, out, tokenizer, random.Random(SEED + 2)):
        yield text[:TEXT] + [example for stream in streams for example in next(stream)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=140)
    args = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    llm, tokenizer, image_id = base_with_pictures(args.cache)
    bank = build_bank(args.out, args.cache)
    projector = load_projector(bank, llm, args.out / "projector")
    tuned = with_lora(llm)
    set_peft_model_state_dict(tuned, load_file(args.out / "joint" / LORA))
    tuned.train()
    parameters = trainable(tuned)
    parameters |= {f"projector.{n}": p for n, p in projector.named_parameters()}
    folder = args.out / FOLDER
    train(
        parameters,
        loss_of_both(
            text_loss(tuned, tokenizer),
            loss_with(tuned.base_model.model, projector, bank, tokenizer, image_id),
        ),
        steps(bank, args.out, tokenizer),
        steps=args.steps,
        lr=lambda name: 6e-4 if name.startswith("projector.") else 4e-4,
        out=folder,
    )
    save_lora(tuned, folder)
    save_projector(projector, folder)


if __name__ == "__main__":
    main()
