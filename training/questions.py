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

import random
import re
from collections.abc import Iterator
from pathlib import Path

from training import pictures as pics
from training.align import batches
from training.common import END, IMAGE_PROMPT, SEED, Example, stage
from training.joint import STEMS, both, train_together
from training.lora import with_lora
from training.projector import (
    Bank,
    base_with_pictures,
    build_bank,
    grounded_examples,
    load_projector,
    naming_examples,
    questions,
    save_projector,
    sentence,
    together,
)

ASKED = 12  # yes-or-no questions of each kind in a step: about what is there, and what is not
OPEN, NAMING, GROUNDED = 6, 4, 4
TEXT = 24  # prompts without a picture in a step, half of them refused


def by_kind(bank: Bank) -> tuple[list[Example], list[Example], list[Example]]:
    """easy-VQA's questions: yes or no about what the picture shows, yes or no about what it does
    not, and those for a shape or a colour."""
    there, absent, rest = [], [], []
    for question, answer, place in questions(bank):
        seen = bank.shape_of[place]
        if answer not in ("yes", "no"):
            kind, text = rest, sentence(answer, seen)
        elif seen:
            words = re.findall(r"[a-z]+", question.lower())
            asked = next(word for word in words if word in pics.SHAPES or word in pics.COLOURS)
            kind, said = (there, asked) if asked in seen.split() else (absent, f"not {asked}")
            text = f"It is a {seen}: {said}, so {answer}."
        else:
            continue  # what is seen is not known
        kind.append(Example(IMAGE_PROMPT.format(question), text + END, place))
    return there, absent, rest


def steps(bank: Bank, out: Path, tokenizer) -> Iterator[list[Example]]:
    """Endless steps of all that this stage trains and rehearses."""
    there, absent, rest = by_kind(bank)
    pools = [
        (there, ASKED),
        (absent, ASKED),
        (rest, OPEN),
        (naming_examples(bank, random.Random(SEED)), NAMING),
        (grounded_examples(bank, out, tokenizer), GROUNDED),
    ]
    text = (group[:TEXT] for group in batches(STEMS, out, tokenizer, random.Random(SEED + 2)))
    return both(text, together(pools, SEED))


def main() -> None:
    args = stage(__doc__, steps=160)
    llm, tokenizer, image_id = base_with_pictures(args.cache)
    bank = build_bank(args.out, args.cache)
    projector = load_projector(bank, llm, args.out / "projector")
    tuned = with_lora(llm, args.out / "joint")
    folder = args.out / "questions"
    train_together(
        tuned,
        projector,
        bank,
        tokenizer,
        image_id,
        steps(bank, args.out, tokenizer),
        steps=args.steps,
        rates=(4e-4, 6e-4),
        out=folder,
    )
    save_projector(projector, folder)


if __name__ == "__main__":
    main()
