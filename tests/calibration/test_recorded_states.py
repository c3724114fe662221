"""What is recorded for gates, and which scores are of the same prompt."""

from __future__ import annotations

import math

import torch

from vlm_safeguard.calibration.gate_fitting import GateFit
from vlm_safeguard.calibration.recorded_states import Readings, Recorded, States


def states(ids: str, harmful: list[bool]) -> States:
    """One letter for each prompt."""
    count = len(ids)
    folds = torch.zeros(count, dtype=torch.long)
    counted = torch.ones(count, dtype=torch.bool)
    return States(tuple(ids), torch.zeros(count, 1, 2), torch.tensor(harmful), folds, counted)


def gate(judged: list[bool], *scores: float) -> GateFit:
    unseen = torch.tensor(scores), torch.empty(0)
    return GateFit((0,), torch.ones(1, 2), 0.0, unseen=unseen, judged=tuple(judged))


def test_scores_of_both_gates_are_of_the_same_harmful_prompt() -> None:
    """Prompt u cannot be told by its words, and w was not recorded as text; x is harmless."""
    none = Readings(torch.empty(0, 1, 2), torch.empty(0, 2), torch.empty(0, 2, dtype=torch.long))
    recorded = Recorded(
        torch.zeros(2, 3, 1, 2),
        {},
        [],
        states("abxc", [True, True, False, True]),
        none,
        {
            "blank": states("xaw", [False, True, True]),
            "picture": states("cbu", [True, True, True]),
        },
        frozenset("u"),
    )
    # Behind a, b and c come three anchors, which judge nothing; b had no fold of its own either.
    text = gate([True, False, True, False, False, False], 1.0, 3.0)
    in_vlm = gate([True] * 5, 10.0, 20.0, 30.0, 40.0, 50.0)  # a, w, c, b, u
    other = gate([True, True, False, False, False, False], 5.0, 7.0)  # judged by b, not by c
    found = recorded.found_together([text, text], in_vlm)
    assert found.tolist() == [[1.0, 1.0, 10.0], [3.0, 3.0, 30.0], [-math.inf, -math.inf, 50.0]]
    found = recorded.found_together([text, other], in_vlm)
    assert found.tolist() == [[1.0, 5.0, 10.0], [-math.inf, -math.inf, 50.0]]
