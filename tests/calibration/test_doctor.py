"""The doctor's checks of what a guard does: attacks that it stops, and harmless requests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vlm_safeguard.calibration import doctor
from vlm_safeguard.calibration.attack_trials import Attacks
from vlm_safeguard.calibration.generation import Response
from vlm_safeguard.calibration.recognition import ByTokens
from vlm_safeguard.data.inputs import PICTURED
from vlm_safeguard.data.prompts import CalibrationData, Label, Prompt
from vlm_safeguard.utils.progress import Progress


def prompt(number: int, label: Label, intent: str = "") -> Prompt:
    name = f"{label}-{intent}-{number}"
    return Prompt(name, f"Question {name}?", label, "plain", intent, cluster=name)


HELD = [
    *(prompt(n, "harmful") for n in range(60)),
    *(prompt(n, "harmless") for n in range(60)),
    *(prompt(n, "harmless", "lookalike") for n in range(60)),
]
DATA = CalibrationData(anchors=(), fit=(), bound=(), held=HELD, sha256={})


def effect(
    monkeypatch: pytest.MonkeyPatch,
    before: int = 40,
    after: int = 0,
    opened: int = 0,
    refused: int = 0,
    budget: dict[str, float] | None = None,
) -> dict[str, doctor.Check]:
    """What the doctor finds where ``before`` attacks of each setting succeed without the guard and
    ``after`` with it, the gate opens on ``opened`` harmless requests, and the model refuses
    ``refused`` of these by itself."""
    settings: list[str] = []

    own = ByTokens((5,))  # how refusals were recognised when the guard was made

    def attack(
        _: Any, guard: Any, items: Any, setting: Any, tokens: int, recogniser: Any
    ) -> Attacks:
        assert recogniser is own
        assert len(items) == 60 and all(p.harmful for p in items)
        settings.append(setting)
        plain, guarded = ([n < count for n in range(len(items))] for count in (before, after))
        return Attacks(list(items), plain, guarded)

    def respond(_: Any, items: Any, guard: Any, **options: Any) -> list[Response]:
        assert len(items) == 60  # no lookalikes
        return [Response("", 1, True, fired=n < opened) for n in range(len(items))]

    def answered(_: Any, items: Any, recogniser: Any) -> list[bool]:
        assert recogniser is own
        assert len(items) == opened and not any(p.harmful for p in items)
        return [n >= refused for n in range(len(items))]

    monkeypatch.setattr(doctor, "attack", attack)
    monkeypatch.setattr(doctor, "respond", respond)
    monkeypatch.setattr(doctor, "answered", answered)
    calibration = {} if budget is None else {"budget": budget}
    guard: Any = SimpleNamespace(config=SimpleNamespace(calibration=calibration))
    loaded: Any = None
    found = doctor._effect(loaded, guard, DATA, own, Progress(quiet=True))
    assert settings == list(PICTURED)
    return {check.name: check for check in found}


def test_a_guard_that_stops_attacks_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    check = effect(monkeypatch, before=40, after=10)["effect"]
    assert check.ok
    assert check.found.startswith("10 of 60 attacks with images succeed, unguarded 40 ")


@pytest.mark.parametrize(
    ("before", "after"),
    [(40, 40), (10, 40), (40, 38), (0, 5)],
    ids=["nothing", "worse", "no more than chance", "attacks that the guard lets in"],
)
def test_a_guard_that_does_not_help_fails(
    before: int, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not effect(monkeypatch, before=before, after=after)["effect"].ok


def test_where_no_attack_succeeds_there_is_nothing_to_help(monkeypatch: pytest.MonkeyPatch) -> None:
    assert effect(monkeypatch, before=0, after=0)["effect"].ok


def test_false_positives_within_the_budget_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    assert effect(monkeypatch, opened=0)["false positives"].ok
    # Two of sixty may be chance: their interval reaches down to the budget.
    check = effect(monkeypatch, opened=2)["false positives"]
    assert check.ok and "budget 2.0%" in check.found


def test_false_positives_over_the_budget_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not effect(monkeypatch, opened=20)["false positives"].ok


def test_the_guards_own_budget_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = effect(monkeypatch, opened=20, budget={"false_positives": 0.3})["false positives"]
    assert wide.ok and "budget 30.0%" in wide.found


def test_an_open_gate_costs_nothing_where_the_model_refuses_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check = effect(monkeypatch, opened=20, refused=20)["false positives"]
    assert check.ok
    assert "opens on 20 that are refused as text too" in check.found
