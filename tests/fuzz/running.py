"""Load mutations, and count what became of them."""

from __future__ import annotations

import re
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tests.fuzz.guards import seeds
from tests.fuzz.mutations import mutation
from tests.fuzz.rules import check_loaded
from vlm_safeguard.errors import GuardError
from vlm_safeguard.guard import Guard


@dataclass
class Summary:
    """What became of the mutations."""

    count: int = 0
    seed: int = 0
    refused: int = 0
    loaded: int = 0  # changed in what the format leaves free, with every rule kept
    crashes: list[str] = field(default_factory=list)
    wrong_loads: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    refused_by: Counter[str] = field(default_factory=Counter)
    slowest_ms: float = 0.0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return vars(self) | {
            "kinds": dict(self.kinds.most_common()),
            "refused_by": dict(self.refused_by.most_common()),
            "crashes": self.crashes[:20],
            "wrong_loads": self.wrong_loads[:20],
        }


CHECKS = {
    "size": "larger than|bytes of tensors|does not have the size",
    "encoding": "not UTF-8|byte order mark",
    "JSON syntax": "not valid JSON|not a JSON number|not finite$",
    "key twice": "twice",
    "nesting": "nested",
    "texts and integers": "control characters|a text of more|holds the integer",
    "schema version": "guard schema|not a JSON object",
    "mode erase": "`erase` is an ablation",
    "gone with schema 1": "is of schema 1 and uses",
    "not registered": "unknown steering mode|unknown kind of gate",
    "zero anchor": "the (anchor|refusal) of layer",
    "field": r"^guard\.json: ",
    "digest": "does not match the digest",
    "tensor names": "missing or unexpected",
    "tensor entry": "malformed|, not float32|settings call for|do not match its size|leave gaps",
    "layer range": "names layers outside",
    "values": "not finite float32",
    "orthonormal": "not orthonormal",
    "safetensors": "is damaged",
}


def reason(error: GuardError) -> str:
    """Which check refused."""
    found = (name for name, words in CHECKS.items() if re.search(words, str(error)))
    return next(found, f"other: {error}"[:200])


def run(numbers: range, seed: int = 0) -> Summary:
    """Load every mutation of ``numbers``."""
    sources, summary = seeds(), Summary(seed=seed)
    for files in sources:
        check_loaded(Guard.from_bytes(*files), files)  # the sound ones are sound
    began = time.perf_counter()
    for number in numbers:
        kind, files = mutation(number, seed, sources)
        summary.count += 1
        summary.kinds[kind] += 1
        before = time.perf_counter()
        try:
            guard = Guard.from_bytes(*files)
        except GuardError as error:
            summary.refused += 1
            summary.refused_by[reason(error)] += 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            last = traceback.format_exception_only(error)[-1].strip()
            summary.crashes.append(f"{number} {kind}: {last}"[:300])
        else:
            try:
                check_loaded(guard, files)
                summary.loaded += 1
            except Exception as error:
                summary.wrong_loads.append(f"{number} {kind}: {error!r}"[:300])
        summary.slowest_ms = max(summary.slowest_ms, 1e3 * (time.perf_counter() - before))
    summary.seconds = round(time.perf_counter() - began, 1)
    summary.slowest_ms = round(summary.slowest_ms, 1)
    return summary
