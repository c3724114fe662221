"""The interface of a defence: a prompt rewrite, a guard, or both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vlm_safeguard.guard import Guard


@dataclass(frozen=True)
class Defence:
    """``reword`` is applied to the text of every request; ``guard`` is attached to the model."""

    name: str
    reword: Callable[[str], str] = str  # as it came
    guard: Guard | None = None
