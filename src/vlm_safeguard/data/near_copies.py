"""Finds texts that ask the same in nearly the same words."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

SHARED = 0.5  # share of the rarer text's word triples from which two texts are copies
COMMON = 40  # texts that hold a triple from which it says nothing ("how do I")


def clusters(texts: Sequence[str], names: Sequence[str] = ()) -> list[int]:
    """A number for each text; near copies, and copies of these, have the same one.

    ``names``: of what each text asks, "" where that is unknown. Texts of one name are together.

    Two texts are near copies if they have the same words, or at least half of the word triples of
    the one that has fewer. Triples that very many texts hold do not count.
    """
    words = [tuple(re.findall(r"\w+", text.casefold())) for text in texts]
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, said in enumerate(words):
        for triple in _triples(said):
            holders[triple].append(number)
    telling = {triple for triple, found in holders.items() if len(found) <= COMMON}
    parent = list(range(len(texts)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    first: dict[tuple[str, ...], int] = {}
    named: dict[str, int] = {}
    for number, name in enumerate(names):
        if name:
            parent[root(number)] = root(named.setdefault(name, number))
    sizes = [len(_triples(said) & telling) for said in words]
    for number, said in enumerate(words):
        parent[root(number)] = root(first.setdefault(said, number))
        shared = Counter(
            other
            for triple in _triples(said) & telling
            for other in holders[triple]
            if other < number
        )
        for other, count in shared.items():
            if count >= SHARED * min(sizes[number], sizes[other]):
                parent[root(number)] = root(other)
    return [root(number) for number in range(len(texts))]


def _triples(words: tuple[str, ...]) -> set[tuple[str, ...]]:
    return {words[n : n + 3] for n in range(len(words) - 2)}
