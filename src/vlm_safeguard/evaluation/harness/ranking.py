"""Finds where another defence beats the guard, and whether the gate or the steering failed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

GUARD = "guard"
GARBLED = 0.01  # share of unusable responses above which a defence is no rival


@dataclass(frozen=True)
class Beaten:
    """A rate of the guard in one cell that is not the lowest.

    Attributes:
        rivals: the defences with a lower one.
        count: attacks that succeed, or harmless prompts that are refused, under the guard.
        opened: on how many of those a gate was open; None where the guard did not say.
    """

    model: str
    benchmark: str
    setting: str
    rate: str
    rivals: tuple[str, ...]
    count: int
    n: int
    opened: int | None


def beaten(entries: Sequence[dict[str, Any]], rates: Sequence[str]) -> list[Beaten]:
    """Every cell and rate in which a rival has a lower rate than the guard.

    A garbled answer is no defence: who garbles more than ``GARBLED`` of a cell is no rival in it.

    Args:
        entries: the table of ``results.table``.
        rates: names of the rates to look at.
    """
    found = []
    for own in (e for e in entries if e["defence"] == GUARD):
        place = own["model"], own["benchmark"], own["setting"]
        others = [
            e
            for e in entries
            if e["defence"] != GUARD and (e["model"], e["benchmark"], e["setting"]) == place
        ]
        for rate in rates:
            rivals = tuple(
                e["defence"]
                for e in others
                if None not in (e[rate], own[rate]) and e[rate] < own[rate] and _usable(e)
            )
            if rivals:
                count, n = own[f"{rate}_count"], own[f"{rate}_n"]
                found.append(Beaten(*place, rate, rivals, count, n, own[f"{rate}_opened"]))
    return found


def _usable(entry: dict[str, Any]) -> bool:
    return bool(entry["degenerate"] + entry["empty"] <= GARBLED * entry["n"])
