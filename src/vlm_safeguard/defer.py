"""`defer`: where the gate is open, the language model alone answers, without the pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm_safeguard.errors import GuardRuntimeError
from vlm_safeguard.request import Request
from vlm_safeguard.witness import positions_of


def without_pictures(request: Request, options: dict[str, Any]) -> dict[str, Any]:
    """Keywords of a forward call in which open rows do not attend to their pictures at all.

    Raises:
        GuardRuntimeError: the call has no token ids, or a mask or positions of another form.
    """
    columns, given = request.text_columns, options.get("attention_mask")
    flat = given is None or (isinstance(given, Tensor) and given.ndim == 2)
    if columns is None or not flat:
        raise GuardRuntimeError("`defer` needs input_ids and a two-dimensional attention mask")
    positions = options.get("position_ids")
    if positions is None:
        positions = torch.arange(request.first, request.end, device=columns.device)[None]
    if positions.ndim != 2:
        raise GuardRuntimeError("`defer` needs two-dimensional position ids")
    if given is None:
        given = torch.ones(len(columns), request.end, dtype=torch.long, device=columns.device)
    opened = torch.tensor(request.fired("text"), device=columns.device)[:, None]
    mask = given.clone()
    prompt = mask[:, : request.prompt_width]
    prompt[opened & ~columns[:, : prompt.shape[1]]] = 0
    own = positions_of(mask)[:, request.first : request.end]
    return options | {"attention_mask": mask, "position_ids": torch.where(opened, own, positions)}
