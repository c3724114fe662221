"""The text-only reading of a request: the same conversation with its images taken out.

The language model can see harm in words even where the VLM no longer does. What it would see is
derived from the token ids themselves, so that a plain ``model.generate(**inputs)`` is guarded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlm_safeguard.errors import ModelError
from vlm_safeguard.models import LoadedModel, conversation


@dataclass(frozen=True)
class ImageMarkup:
    """How one picture stands in the token ids: ``before``, image tokens, ``after``.

    ``before`` and ``after`` are the wrapper tokens that the template writes around a picture and
    leaves out where there is none (LLaVA's newline, Qwen's vision start and end).
    """

    token_ids: tuple[int, ...]
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    def kept(self, ids: list[int]) -> list[int]:
        """Indices of ``ids`` that stay when pictures and their wrappers are taken out."""
        tokens, place = set(self.token_ids), 0
        kept: list[int] = []
        while place < len(ids):
            if ids[place] not in tokens:
                kept.append(place)
                place += 1
                continue
            start = max(0, place - len(self.before))
            touching = kept[len(kept) - (place - start) :] == list(range(start, place))
            if touching and self.before and tuple(ids[start:place]) == self.before:
                del kept[-len(self.before) :]
            while place < len(ids) and ids[place] in tokens:
                place += 1
            if self.after and tuple(ids[place : place + len(self.after)]) == self.after:
                place += len(self.after)
        return kept


def find_markup(loaded: LoadedModel) -> ImageMarkup:
    """Derive the markup by rendering a probe conversation with and without a picture.

    Raises:
        ModelError: taking the image tokens out does not lead back to the text-only rendering.
    """
    processor = loaded.processor
    token_id = getattr(loaded.model.config, "image_token_id", None)
    if token_id is None:
        token_id = getattr(loaded.model.config, "image_token_index", None)
    if token_id is None:
        raise ModelError(f"{loaded.name}: its configuration names no image token")
    probe = "How do I bake bread?"
    text, pictured = (
        processor.apply_chat_template(
            conversation(probe, count), add_generation_prompt=True, tokenize=False
        )
        for count in (0, 1)
    )
    plain = _ids(processor, text=[text])
    blank = Image.new("RGB", (64, 64), (127, 127, 127))
    full = _ids(processor, text=[pictured], images=[blank])
    places = [i for i, token in enumerate(full) if token == token_id]
    if not places:
        raise ModelError(f"{loaded.name}: its template puts no image token into the prompt")
    extra = len(full) - len(plain)
    start = _common_prefix(plain, full)
    # Where a wrapper equals its neighbour the cut can slide: prefer the one that keeps the text.
    for first in range(min(start, places[0]), -1, -1):
        if full[:first] + full[first + extra :] == plain and first + extra > places[-1]:
            before = tuple(full[first : places[0]])
            after = tuple(full[places[-1] + 1 : first + extra])
            inside = tuple(sorted(set(full[places[0] : places[-1] + 1])))
            return ImageMarkup(inside, before, after)
    raise ModelError(
        f"{loaded.name}: its chat template words a request with a picture differently beyond the "
        "picture itself, so the text-only reading cannot be derived from the token ids"
    )


def _ids(processor: Any, **inputs: Any) -> list[int]:
    return processor(**inputs, add_special_tokens=False, return_tensors="pt")["input_ids"][
        0
    ].tolist()


def _common_prefix(left: list[int], right: list[int]) -> int:
    count = 0
    while count < min(len(left), len(right)) and left[count] == right[count]:
        count += 1
    return count


def text_columns(input_ids: Tensor, attention_mask: Tensor, markup: ImageMarkup) -> Tensor:
    """Which columns (B, T) of a padded batch belong to its text-only reading."""
    chosen = torch.zeros(input_ids.shape, dtype=torch.bool)
    ids, mask = input_ids.cpu(), attention_mask.cpu().bool()
    for row in range(len(ids)):
        places = mask[row].nonzero().flatten()
        kept = markup.kept(ids[row][places].tolist())
        chosen[row, places[kept]] = True
    return chosen.to(input_ids.device)


def text_only(input_ids: Tensor, columns: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    """Text-only ids and mask of a batch, left-padded: both (B, T') for inputs (B, T)."""
    width = int(columns.sum(1).max())
    ids = input_ids.new_full((len(input_ids), width), pad_id)
    mask = torch.zeros_like(ids)
    for row, (source, chosen) in enumerate(zip(input_ids, columns, strict=True)):
        count = int(chosen.sum())
        ids[row, width - count :] = source[chosen]
        mask[row, width - count :] = 1
    return ids, mask


def positions_of(attention_mask: Tensor) -> Tensor:
    """Position ids (B, T) that count attended tokens only."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
