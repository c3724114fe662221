"""Makes a request's state and its text-only prompt from the inputs of a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm_safeguard.artifact.config import GuardConfig, ImageMarkup
from vlm_safeguard.errors import GuardRuntimeError
from vlm_safeguard.model.text_only import text_columns, text_only
from vlm_safeguard.runtime.request import Request


def begin(
    config: GuardConfig,
    ids: Tensor | None,
    mask: Tensor | None,
    embeds: Tensor | None,
    needs_ids: bool,
) -> tuple[Request, Tensor]:
    """A new request from its whole prompt, and its attention mask (B, T).

    Args:
        ids: input ids, (B, T). embeds: input embeddings, (B, T, d). One may be missing.
        mask: attention mask, (B, T); missing, leading padding is found by its token.
        needs_ids: whether the guard reads the request's text from its ids.

    Raises:
        GuardRuntimeError: the prompt is missing, empty, or cannot be read.
    """
    if ids is None and needs_ids:
        raise GuardRuntimeError(
            "the guard reads the request's text from input_ids, which are missing"
            + (" (only inputs_embeds were given)" if embeds is not None else "")
            + ": pass input_ids, or the request as text in text_input_ids"
        )
    given = ids if ids is not None else embeds
    if given is None:
        raise GuardRuntimeError(
            "a forward call without input_ids cannot be guarded: pass them, or inputs_embeds with "
            "the request as text in text_input_ids"
        )
    if given.ndim < 2 or given.shape[1] == 0:
        raise GuardRuntimeError("the prompt is empty: input_ids hold no row or no token")
    if embeds is not None and embeds.shape[:2] != given.shape[:2]:
        raise GuardRuntimeError(
            f"input_ids {tuple(given.shape[:2])} and inputs_embeds {tuple(embeds.shape[:2])} "
            "differ in length: pass those of the same prompt"
        )
    if mask is None:
        mask = torch.ones(given.shape[:2], device=given.device, dtype=torch.long)
        if ids is not None:
            mask = after_padding(ids, config.markup.pad_id).long()
    if not isinstance(mask, Tensor) or mask.shape != given.shape[:2]:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise GuardRuntimeError(
            f"the attention mask must have the prompt's shape {tuple(given.shape[:2])}, got {found}"
        )
    filled = mask.any(1).tolist()
    if not all(filled):
        raise GuardRuntimeError(
            f"row {filled.index(False)} of the batch has no tokens: leave it out, or correct its "
            "attention mask"
        )
    width, attended = mask.shape[1], mask.bool()
    last = width - 1 - attended.long().flip(1).argmax(1)
    padding = (~attended).sum(1).tolist()
    return Request(config.gates, width, last.tolist(), padding), mask


def after_padding(ids: Tensor, pad_id: int) -> Tensor:
    """Which of ids (B, T) are tokens where no mask tells: only what leads a row can be padding."""
    return (ids != pad_id).cumsum(1) > 0


def take_text(options: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Take ``text_input_ids`` and ``text_attention_mask`` out of the keywords of a call.

    They are the request as text, left-padded, (B, T'). The text-only pass uses them instead of the
    text of the prompt; the model does not get them. The mask may be left out if nothing is padded.

    Raises:
        GuardRuntimeError: they are not token ids, the mask does not fit, or it pads on the right.
    """
    ids, mask = options.pop("text_input_ids", None), options.pop("text_attention_mask", None)
    if ids is None:
        if mask is not None:
            raise GuardRuntimeError("text_attention_mask comes without text_input_ids")
        return None
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] == 0 or ids.is_floating_point():
        raise GuardRuntimeError("text_input_ids must be token ids of shape (rows, tokens)")
    mask = torch.ones_like(ids) if mask is None else mask
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        raise GuardRuntimeError("text_attention_mask must have the shape of text_input_ids")
    if not bool(mask[:, -1].bool().all()) or bool((mask.long().diff(dim=1) < 0).any()):
        raise GuardRuntimeError("text_input_ids must be padded on the left")
    return ids, mask


def derive_text(
    model: Any,
    markup: ImageMarkup,
    ids: Tensor | None,
    mask: Tensor,
    embeds: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The words of a request alone, ids and mask (B, T'), out of its prompt's ids (B, T).

    Raises:
        GuardRuntimeError: a row holds no text, or ``embeds`` are not those of the text.
    """
    columns = text_columns(ids, mask, markup) if ids is not None else None
    _check_embeds(model, ids, embeds, columns)
    if ids is None or columns is None or not bool(columns.any(1).all()):
        raise GuardRuntimeError(
            "a row of the batch has no text besides its pictures, not even its chat template's: "
            "make the inputs with guard.prepare(processor, messages)"
        )
    return text_only(ids, columns, markup.pad_id)


def _check_embeds(
    model: Any, ids: Tensor | None, embeds: Tensor | None, columns: Tensor | None
) -> None:
    """Refuse a prompt that is given twice, as ids and as embeddings, and says two things: the guard
    reads the ids, the model the embeddings.

    Args:
        ids: (B, T). embeds: (B, T, d). columns: (B, T) where the guard reads the text.

    Raises:
        GuardRuntimeError: the embeddings of the text are not those of its ids.
    """
    if ids is None or embeds is None or columns is None:
        return
    given = embeds[columns]
    read = model.get_input_embeddings()(ids[columns]).to(given.device)
    if read.shape != given.shape or not torch.allclose(given.float(), read.float(), 1e-2, 1e-4):
        raise GuardRuntimeError(
            "inputs_embeds are not those of the text in input_ids, which the guard reads: pass one "
            "of them, or the request as text in text_input_ids"
        )
