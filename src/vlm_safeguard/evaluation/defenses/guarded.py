"""The calibrated guard as a defence."""

from __future__ import annotations

from vlm_safeguard.evaluation.defenses.base import Defence
from vlm_safeguard.guard import Guard


def build(guard: Guard) -> Defence:
    return Defence("guard", guard=guard)
