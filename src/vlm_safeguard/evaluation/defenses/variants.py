"""Copies of a guard with other settings, for comparisons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vlm_safeguard.artifact.config import GuardConfig
from vlm_safeguard.guard import Guard


def changed(guard: Guard, tensors: Mapping[str, Tensor] | None = None, **settings: Any) -> Guard:
    """The same guard with other settings (fields of ``GuardConfig``), validated."""
    fields = {name: getattr(guard.config, name) for name in type(guard.config).model_fields}
    config = GuardConfig.model_validate({**fields, **settings})
    return Guard(config, dict(guard.tensors if tensors is None else tensors))
