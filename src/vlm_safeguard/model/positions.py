"""How many positions a model has, and how many a request takes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlm_safeguard.artifact.config import ImageMarkup


def room(model: Any) -> int | None:
    """The number of positions of a model; None if it has no fixed number.

    It is ``max_position_embeddings``, or more where rotary embeddings are scaled from fewer. A
    sliding window is no limit: tokens outside it are still positions.
    """
    config = model.config.get_text_config(decoder=True)
    found = getattr(config, "max_position_embeddings", None)
    if not isinstance(found, int):
        return None
    for rope in _ropes(config):
        if rope.get("rope_type") == "dynamic":  # it grows with the prompt
            return None
        original = rope.get("original_max_position_embeddings") or found
        found = max(found, int(original * (rope.get("factor") or 1)))
    return found


def rescales(model: Any) -> bool:
    """Whether a long prompt changes the rotary embedding of all its positions."""
    ropes = _ropes(model.config.get_text_config(decoder=True))
    kinds = [str(rope.get("rope_type")) for rope in ropes]
    return any("dynamic" in kind or kind == "longrope" for kind in kinds)


def taken(model: Any, ids: Tensor | None, mask: Tensor, markup: ImageMarkup) -> int:
    """How many positions the longest row of ids (B, T) with a mask (B, T) takes at least.

    Where positions count in three dimensions (M-RoPE), a picture takes fewer than it has tokens, so
    only the text is counted.
    """
    config = model.config.get_text_config(decoder=True)
    counted = mask.bool()
    if ids is not None and any("mrope_section" in rope for rope in _ropes(config)):
        pictured = ids.new_tensor(markup.token_ids)
        counted = counted & (ids[..., None] != pictured).all(-1)
    return int(counted.sum(1).max())


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The settings of rotary embeddings; there may be several, by the type of layer."""
    found = getattr(config, "rope_parameters", None) or {}
    each = [part for part in found.values() if isinstance(part, dict)]
    return each or [found]
