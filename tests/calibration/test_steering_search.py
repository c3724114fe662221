"""The choice among steering settings."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from vlm_safeguard.artifact.config import Steering
from vlm_safeguard.calibration import steering_search
from vlm_safeguard.calibration.budget import Budget, Effort
from vlm_safeguard.data.inputs import Query
from vlm_safeguard.data.prompts import calibration
from vlm_safeguard.utils.progress import Progress


def test_of_equally_good_settings_the_first_candidate_is_taken(
    monkeypatch: pytest.MonkeyPatch, model: Any
) -> None:
    """A request's own coordinates cannot undo its refusal, so they stand first."""
    rates = {"verdict": (0.25, 0.25), "text": (0.5, 0.5), "anchor": (0.0, 0.25)}  # of two rounds

    def won(steering: Steering, last: bool) -> list[bool]:
        return [place < rates[steering.reference][last] * 4 for place in range(4)]

    patch = partial(monkeypatch.setattr, steering_search)
    patch("_telling", lambda *_: [Query("", None)] * 4)
    patch("successes", lambda _, steering, *__: won(steering, False))
    plain = SimpleNamespace(guarded=lambda _, steering, *__: won(steering, True))
    patch("without", lambda *_: plain)
    patch("harmless_cost", lambda *_: SimpleNamespace(kl=0.0, least_kl=0.0))
    loaded: Any = SimpleNamespace(model=model)
    build: Any = lambda steering: steering  # noqa: E731
    fit, effort, quiet = calibration("fit")[:20], Effort(), Progress(quiet=True)
    chosen: Any = None
    chosen, tried = steering_search.search(
        loaded, build, True, True, 8, fit, Budget(), effort, quiet
    )
    finals = [one["final_asr"] for one in tried if "final_asr" in one]
    assert finals == [0.25] * effort.finalists
    assert chosen.reference == "verdict"
    assert [one["steering"]["reference"] for one in tried if "chosen" in one] == ["verdict"]
