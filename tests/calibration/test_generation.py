"""What is noted of a guard's gates beside a response."""

from __future__ import annotations

import math

from tests import tiny
from vlm_safeguard.calibration.generation import gate_of
from vlm_safeguard.runtime.attestation import Decision


def test_a_score_is_per_layer_whatever_refusal_signs_add() -> None:
    """Raising the threshold of both layers by 1.5 shuts the first gate: the signs have none."""
    gates = [tiny.gate("text", 1, 2), tiny.gate("vlm", 3, 4, per_layer=True), tiny.gate("text", 2)]
    parts = {"text.0": [1.0, 0.5, 1.5], "vlm.1": [-1.0, 2.0], "text.2": [math.nan]}
    scores = parts | {"text.0": [3.0]}
    assert gate_of(Decision(True, True, True, scores, parts), gates) == (True, 1.5)
    assert gate_of(None, gates) == (None, None)
    unread = {"text.0": [math.nan]}
    assert gate_of(Decision(False, False, False, unread, unread), gates[:1]) == (False, None)
