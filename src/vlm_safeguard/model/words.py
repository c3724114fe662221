"""Finds a request's own words among the tokens of its text, and averages the states over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm_safeguard.artifact.config import TextFrame
from vlm_safeguard.errors import ModelError
from vlm_safeguard.model.chat import process, render


def unlike_requests(processor: Any) -> dict[str, Tensor] | None:
    """Inputs of two requests that differ in all of their words: what they share is the template's.

    Returns:
        None if the template takes no request without a picture.
    """
    try:
        return process(processor, [render(processor, word, 0) for word in ("a", "b")], [(), ()])
    except ModelError:
        return None


def find_frame(processor: Any) -> TextFrame | None:
    """How many tokens the chat template writes before and behind a request's words.

    Returns:
        None if the template takes no request without a picture.
    """
    inputs = unlike_requests(processor)
    if inputs is None:
        return None
    first, second = inputs["input_ids"]
    same = (first == second).long()
    return TextFrame(before=int(same.cumprod(0).sum()), after=int(same.flip(0).cumprod(0).sum()))


def word_weights(lengths: Tensor, width: int, frame: TextFrame) -> Tensor:
    """Weights (B, width) that average over the words of each row of a pass.

    They are equal for all tokens but those of the frame. A row without others, such as an empty
    request, is averaged over all that come after the first ``frame.before``, if there are any, else
    over the whole row.

    Args:
        lengths: number of tokens of each row, (B,).
        width: the pass computed so many columns, the last ones of rows that are padded on the left.
    """
    columns = torch.arange(width, device=lengths.device)
    place = lengths[:, None] - width + columns  # of each column's token in its row
    behind = place >= frame.before
    chosen = behind & (columns < width - frame.after)
    chosen = torch.where(chosen.any(1, keepdim=True), chosen, behind)
    chosen = torch.where(chosen.any(1, keepdim=True), chosen, place >= 0)
    return chosen.float() / chosen.sum(1, keepdim=True)


def with_mean(states: Tensor, weights: Tensor) -> Tensor:
    """The last column of states (B, T, d) and their mean by weights (B, T): (B, 2 d), float32."""
    # States of padding may be NaN, which a weight of zero would keep.
    chosen = states.float().masked_fill(weights[..., None] == 0, 0.0)
    mean = torch.bmm(weights[:, None], chosen).squeeze(1)
    return torch.cat([states[:, -1].float(), mean], 1)
