"""The joint stage: pictures are learned while the alignment is rehearsed, on text only.

The alignment's LoRA and a first projector learn together: easy-VQA, naming emoji and instructions
about what is shown, all harmless; and, without any picture, refusals and answers as in
``training.align``, with more questions: indirect harmful ones, and harmless ones in which a single
word sounds bad. The projector of this stage only serves to teach the language model what to do
with pictures; another is trained after it, alone (``training.projector``).

    python -m training.joint --cache training/cache --out training/out
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from training.align import batches
from training.common import SEED, Example, train
from training.lora import FILE, save_lora, text_loss, trainable, with_lora
from training.projector import base_with_pictures, build_bank, loss_with, mixture, new_projector

Loss = Callable[[list[Example]], Tensor]

STEMS = ("align", "followup")
PICTURED = 16  # examples with a picture in a step, beside the alignment's


def both(text: Iterator[list[Example]], seen: Iterator[list[Example]]) -> Iterator[list[Example]]:
    """Steps of the alignment and of the visual mixture together."""
    while True:
        yield next(text) + next(seen)


def loss_of_both(of_text: Loss, of_pictures: Loss) -> Loss:
    """The loss of a group of examples of which some have a picture and some have none."""

    def loss_of(group: list[Example]) -> Tensor:
        text = [example for example in group if example.image is None]
        return of_text(text) + of_pictures([e for e in group if e.image is not None])

    return loss_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    llm, tokenizer, image_id = base_with_pictures(args.cache)
    bank = build_bank(args.out, args.cache)
    projector = new_projector(bank, llm)
    tuned = with_lora(llm)
    set_peft_model_state_dict(tuned, load_file(args.out / "align" / FILE))
    tuned.train()
    parameters = trainable(tuned)
    parameters |= {f"projector.{n}": p for n, p in projector.named_parameters()}
    folder = args.out / "joint"
    train(
        parameters,
        loss_of_both(
            text_loss(tuned, tokenizer),
            loss_with(tuned.base_model.model, projector, bank, tokenizer, image_id),
        ),
        both(
            batches(STEMS, args.out, tokenizer, random.Random(SEED + 1)),
            mixture(bank, args.out, tokenizer, PICTURED, SEED + 1),
        ),
        steps=args.steps,
        lr=lambda name: 2e-3 if name.startswith("projector.") else 3e-4,
        out=folder,
    )
    save_lora(tuned, folder)


if __name__ == "__main__":
    main()
