"""Defences by name: none, the guard as it is, and others in one file each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vlm_safeguard.errors import DataError
from vlm_safeguard.evaluation.defenses import (
    erase,
    goal_priority,
    paper_formula,
    self_reminder,
)
from vlm_safeguard.evaluation.defenses.base import Defence
from vlm_safeguard.guard import Guard

BY_TEXT = {"self-reminder": self_reminder.build, "goal-priority": goal_priority.build}
BY_GUARD: dict[str, Callable[[Guard], Defence]] = {
    "guard": lambda guard: Defence("guard", guard=guard),
    "paper-formula": paper_formula.build,
    "erase-ablation": erase.build,
}
DEFENCES = ("none", *BY_TEXT, *BY_GUARD)


def make_defence(
    name: str, guard: str | Path | None = None, text: str | Path | None = None
) -> Defence:
    """The defence called ``name``.

    Args:
        guard: folder of a calibrated guard, for the defences that are made from one.
        text: file with the exact wording of a prompt-based defence, instead of ours.

    Raises:
        DataError: unknown name, or what it needs is missing or does not belong to it.
        GuardError: the folder holds no sound guard.
    """
    if name not in DEFENCES:
        raise DataError(f"unknown defence {name!r}: use one of {', '.join(DEFENCES)}")
    if text is not None and name not in BY_TEXT:
        raise DataError(f"the defence {name} has no wording: leave out its text file")
    if name in BY_TEXT:
        return BY_TEXT[name](Path(text) if text is not None else None)
    if name in BY_GUARD:
        if guard is None:
            raise DataError(
                f"the defence {name} needs a guard: make one with `vlm-safeguard calibrate MODEL "
                "-o GUARD` and name its folder"
            )
        return BY_GUARD[name](Guard.from_pretrained(Path(guard)))
    return Defence("none")


__all__ = ["BY_GUARD", "DEFENCES", "Defence", "make_defence"]
