"""`defer`: where the gate is open, the language model alone answers, without the pictures.

Their columns are masked, so that no later token attends to them, and positions count what is left.
In a sliding window they would still take up room, and push text out of sight: that is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm_safeguard.errors import GuardError, GuardRuntimeError
from vlm_safeguard.model.loading import Decoder
from vlm_safeguard.model.text_only import positions_of
from vlm_safeguard.runtime.request import Request

# Kinds of layers that see nothing of a masked column; others carry a state through it.
_MASKED = frozenset({"attention", "full_attention", "sliding_attention"})


class Deferral:
    """Takes the pictures of open rows out of the forward calls of one model."""

    def __init__(self, model: Any, decoder: Decoder) -> None:
        """
        Raises:
            GuardError: a mask does not take a picture out of this model.
        """
        name = type(model).__name__
        text = model.config.get_text_config(decoder=True)
        kinds = getattr(text, "layer_types", None) or ()
        if decoder.skipped:
            raise GuardError(
                f"mode `defer` cannot guard {name}: its language model sees pictures by "
                "cross-attention, where masking their tokens does not take them out. Calibrate a "
                "guard of mode `restore`"
            )
        if not _MASKED.issuperset(kinds):
            raise GuardError(
                f"mode `defer` cannot guard {name}: its {', '.join(sorted({*kinds} - _MASKED))} "
                "layers carry a state through masked pictures. Calibrate a guard of mode `restore`"
            )
        slides = not kinds or "sliding_attention" in kinds
        self._window: int | None = getattr(text, "sliding_window", None) if slides else None
        # M-RoPE: a picture's positions depend on its shape, and the model finds them itself.
        self._mrope = any(hasattr(module, "get_rope_index") for module in model.modules())

    def without_pictures(self, request: Request, options: dict[str, Any]) -> dict[str, Any] | None:
        """Keywords of a forward call in which open rows do not attend to their pictures at all;
        None if no row is open.

        Raises:
            GuardRuntimeError: the call has no token ids, no positions where the model has some of
                its own, or a mask or positions of another form; or a sliding window has pictures
                in it and does not reach back to the beginning.
        """
        positions = options.get("position_ids")
        if positions is None and self._mrope:
            raise GuardRuntimeError(
                "`defer` needs the position_ids of each call to this model, whose pictures count "
                "in several dimensions (M-RoPE): pass them, or call model.generate"
            )
        fired = request.fired("text")
        if not any(fired):
            return None
        columns, given = request.text_columns, options.get("attention_mask")
        flat = given is None or (isinstance(given, Tensor) and given.ndim == 2)
        if columns is None or not flat:
            raise GuardRuntimeError("`defer` needs input_ids and a two-dimensional attention mask")
        if positions is None:
            positions = torch.arange(request.first, request.end, device=columns.device)[None]
        if given is None:
            given = torch.ones(len(columns), request.end, dtype=torch.long, device=columns.device)
        opened = torch.tensor(fired, device=columns.device)[:, None]
        mask = given.clone()
        prompt = mask[:, : request.prompt_width]
        hidden = opened & ~columns[:, : prompt.shape[1]] & prompt.bool()
        self._check_in_sight(request, hidden)
        prompt[hidden] = 0
        own = positions_of(mask)[:, request.first : request.end]
        # Text counts alike in every dimension, so that M-RoPE's (dimensions, B, T) take it too.
        dimensions = (2, 3) if self._mrope else (2,)
        if positions.ndim not in dimensions or positions.shape[-1] != own.shape[1]:
            raise GuardRuntimeError(
                f"`defer` needs position ids (rows, tokens), got {tuple(positions.shape)}"
            )
        return options | {
            "attention_mask": mask,
            "position_ids": torch.where(opened, own, positions),
        }

    def _check_in_sight(self, request: Request, hidden: Tensor) -> None:
        """Refuse a call with a picture in its window beside text that the window leaves out, which
        without the picture would be seen. ``hidden`` (B, T): the pictures' columns, True."""
        window = self._window
        if window is None or request.end <= window:
            return
        if bool(hidden[:, max(0, request.first - window + 1) :].any()):
            raise GuardRuntimeError(
                f"`defer` cannot take pictures out of a request of {request.end} tokens here: the "
                f"model's layers see {window} back, and masked pictures take up room in that. Use "
                "a guard of mode `restore`"
            )
