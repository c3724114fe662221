"""The joint stage: pictures are learned while the alignment is rehearsed, on text only.

The alignment's LoRA and a first projector learn together: easy-VQA, naming emoji and instructions
about what is shown, all harmless; and, without any picture, refusals and answers as in
``training.align``, with more questions: indirect harmful ones, and harmless ones in which a single
word sounds bad. The projector of this stage only serves to teach the language model what to do
with pictures; another is trained after it, alone (``training.projector``).

    python -m training.joint --cache training/cache --out training/out
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from training.align import batches
from training.common import SEED, Example, stage, train
from training.lora import save_lora, text_loss, trainable, with_lora
from training.projector import (
    Bank,
    base_with_pictures,
    build_bank,
    loss_with,
    mixture,
    new_projector,
)

STEMS = ("align", "followup")
PICTURED = 16  # examples with a picture in a step, beside the alignment's


def both(text: Iterator[list[Example]], seen: Iterator[list[Example]]) -> Iterator[list[Example]]:
    """Steps of the alignment and of the visual mixture together."""
    while True:
        yield next(text) + next(seen)


def train_together(
    tuned: nn.Module,
    projector: nn.Module,
    bank: Bank,
    tokenizer,
    image_id: int,
    data: Iterator[list[Example]],
    *,
    steps: int,
    rates: tuple[float, float],
    out: Path,
) -> None:
    """Train a LoRA and a projector on examples of which some have a picture and some have none;
    write the LoRA. ``rates``: the highest of each."""
    tuned.train()
    of_text = text_loss(tuned, tokenizer)
    of_pictures = loss_with(tuned.base_model.model, projector, bank, tokenizer, image_id)

    def loss_of(group: list[Example]) -> Tensor:
        text = [example for example in group if example.image is None]
        return of_text(text) + of_pictures([e for e in group if e.image is not None])

    parameters = trainable(tuned)
    parameters |= {f"projector.{n}": p for n, p in projector.named_parameters()}
    train(
        parameters,
        loss_of,
        data,
        steps=steps,
        lr=lambda name: rates[name.startswith("projector.")],
        out=out,
    )
    save_lora(tuned, out)


def main() -> None:
    args = stage(__doc__, steps=300)
    llm, tokenizer, image_id = base_with_pictures(args.cache)
    bank = build_bank(args.out, args.cache)
    projector = new_projector(bank, llm)
    tuned = with_lora(llm, args.out / "align")
    data = both(
        batches(STEMS, args.out, tokenizer, random.Random(SEED + 1)),
        mixture(bank, args.out, tokenizer, PICTURED, SEED + 1),
    )
    train_together(
        tuned,
        projector,
        bank,
        tokenizer,
        image_id,
        data,
        steps=args.steps,
        rates=(3e-4, 2e-3),
        out=args.out / "joint",
    )


if __name__ == "__main__":
    main()
