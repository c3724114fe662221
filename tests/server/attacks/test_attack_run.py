"""A short `make attack`, so that the long one works when it is wanted."""

from __future__ import annotations

import json
import math
from pathlib import Path

from tests.fuzz.attack_run import Run, try_live, try_parsers


def test_a_short_run_finds_no_fault_and_can_go_on(tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    run = Run(state)
    try_parsers(run, 400, 3, math.inf)
    try_live(run, 60, 3, math.inf)
    assert run.faults == [] and run.unguarded == 0
    assert run.outcomes["status 200"] and run.outcomes["status 400"]
    assert run.outcomes["tokens under guard"] > 0
    assert run.outcomes["picture accepted"] and run.outcomes["image refused"]
    assert Run(state).done == {"parsers": 400, "live": 60} == json.loads(state.read_text())["done"]
