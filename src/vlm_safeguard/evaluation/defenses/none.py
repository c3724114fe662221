"""No defence: the unguarded model."""

from __future__ import annotations

from vlm_safeguard.evaluation.defenses.base import Defence


def build() -> Defence:
    return Defence("none")
