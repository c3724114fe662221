"""Samples prompts evenly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

from vlm_safeguard.data.prompts import Prompt

_Item = TypeVar("_Item")


def spaced(items: Sequence[_Item], count: int) -> list[_Item]:
    """``count`` of the items, or all where there are fewer, in equal steps."""
    count = min(count, len(items))
    return [items[n * len(items) // count] for n in range(count)]


def evenly(items: Sequence[Prompt], count: int) -> list[Prompt]:
    """``count`` prompts of each label (or all, where there are fewer), in equal steps."""
    chosen: list[Prompt] = []
    for label in ("harmful", "harmless"):
        chosen += spaced([p for p in items if p.label == label], count)
    return chosen


def thin(items: Sequence[Prompt], count: int) -> list[Prompt]:
    """``count`` prompts of each label (or all, where there are fewer), evenly over the sequence.

    Where templates repeat a question, the part touches as many questions and as many templates
    as it can: 20 of 5 templates x 20 questions are 20 questions, 4 in each template.
    """
    ordered = _staggered([p for p in items if p.harmful])
    return evenly(ordered + _staggered([p for p in items if not p.harmful]), count)


def _staggered(items: list[Prompt]) -> list[Prompt]:
    """Round by round, one prompt of each cluster a round, each round begun one cluster further.

    Equal steps through rounds that all begin with the same cluster would meet the same few
    clusters in every round. Where no cluster repeats there is one round: the sequence itself.
    """
    rounds: list[list[Prompt]] = []
    met: Counter[str] = Counter()
    for item in items:
        if met[item.cluster] == len(rounds):
            rounds.append([])
        rounds[met[item.cluster]].append(item)
        met[item.cluster] += 1
    ordered: list[Prompt] = []
    for n, members in enumerate(rounds):
        start = n % len(members)
        ordered += members[start:] + members[:start]
    return ordered
