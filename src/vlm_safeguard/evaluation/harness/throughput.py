"""Measures the engine's prompts per second, one by one and batched."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

from vlm_safeguard.calibration.generation import Response
from vlm_safeguard.data.inputs import Query
from vlm_safeguard.evaluation.harness.engine import Engine
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.loading import LoadedModel


def throughput(
    loaded: LoadedModel,
    items: Sequence[Query],
    guard: Guard | None,
    *,
    batch: int,
    tokens: int,
    rounds: int,
) -> dict[str, Any]:
    """Prompts per second at batch 1 and at ``batch``, through two engines that share ``loaded``.

    Every round sends all of ``items`` to one engine and then to the other, in alternating order,
    so that a machine that grows slower or faster favours neither.

    Returns:
        Medians over the rounds of ``single``, ``batched`` and their ``ratio`` (with its least and
        most), and for how many prompts both gave the ``same`` response.
    """
    engines = {False: Engine(loaded, 1), True: Engine(loaded, batch)}
    speeds: dict[bool, list[float]] = {False: [], True: []}
    said: dict[bool, list[Response]] = {}
    try:
        for n in range(rounds):
            for batched in (False, True) if n % 2 == 0 else (True, False):
                begin = time.perf_counter()
                answers = [engines[batched].submit(item, guard, tokens) for item in items]
                said[batched] = [answer.result() for answer in answers]
                speeds[batched].append(len(items) / (time.perf_counter() - begin))
    finally:
        for one in engines.values():
            one.close()
    ratios = [many / one for one, many in zip(speeds[False], speeds[True], strict=True)]
    return {
        "prompts": len(items),
        "batch": batch,
        "rounds": rounds,
        "single": statistics.median(speeds[False]),
        "batched": statistics.median(speeds[True]),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "same": sum(a.text == b.text for a, b in zip(said[False], said[True], strict=True)),
    }
