"""Copies of a guard with other settings, for comparisons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vlm_safeguard.artifact.config import GuardConfig
from vlm_safeguard.errors import GuardError
from vlm_safeguard.guard import Guard


def changed(guard: Guard, tensors: Mapping[str, Tensor] | None = None, **settings: Any) -> Guard:
    """The same guard with other settings (fields of ``GuardConfig``), validated.

    ``tensors`` take the place of the guard's own. Those that the settings do not name are left out.

    Raises:
        GuardError: the settings name a tensor that there is not.
    """
    fields = {name: getattr(guard.config, name) for name in type(guard.config).model_fields}
    config = GuardConfig.model_validate({**fields, **settings})
    known = {**guard.tensors, **(tensors or {})}
    missing = config.shapes().keys() - known.keys()
    if missing:
        raise GuardError(f"the guard has no {', '.join(sorted(missing))}, which its settings need")
    return Guard(config, {name: known[name] for name in config.shapes()})
