"""The comparison of gates: its common false-positive rate, its page, and the thresholds set on
questions of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlm_safeguard.calibration import gate_choice, hidden_states
from vlm_safeguard.calibration.budget import Budget, Effort
from vlm_safeguard.calibration.conformal import allowed_exceedances, conformal_threshold
from vlm_safeguard.calibration.gate_choice import useful_gates
from vlm_safeguard.calibration.gate_fitting import GateFit
from vlm_safeguard.data.inputs import Query, settings_of
from vlm_safeguard.data.prompts import calibration
from vlm_safeguard.evaluation.studies import gate_forms
from vlm_safeguard.evaluation.studies.gate_forms import FormResult, at_false_positives, facts, page
from vlm_safeguard.utils.progress import Progress
from vlm_safeguard.utils.stats import wilson

values = st.lists(st.floats(-50, 50), min_size=1, max_size=150).map(torch.tensor)


@given(values, values, st.sampled_from([0.01, 0.05, 0.2]))
def test_no_more_harmless_requests_are_stopped_than_the_share(
    harmful: torch.Tensor, harmless: torch.Tensor, share: float
) -> None:
    found = at_false_positives(harmful, harmless, share)
    # The best that any threshold can do, by trying each harmless score.
    best = max(
        int((harmful > cut).sum()) for cut in harmless if (harmless > cut).double().mean() <= share
    )
    assert found.count == best and found.n == len(harmful)


def test_gates_move_together_until_the_budget_is_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(400, 3, 8, generator=generator)
    gates = [
        GateFit((0, 1), torch.randn(2, 8, generator=generator), 1.0, spread=3.0),
        GateFit((2,), torch.randn(1, 8, generator=generator), -2.0, spread=0.5),
    ]
    seen = torch.linspace(-3, 3, 61)
    gates[0] = replace(gates[0], unseen=(seen + 1, seen - 1))
    scores = torch.stack([g.scores(states) / g.spread for g in gates]).max(0).values
    shift = conformal_threshold(scores, 0.02)
    moved = [gate.moved(shift) for gate in gates]
    fired = torch.stack([g.scores(states) > 1e-4 for g in moved]).any(0)
    assert int(fired.sum()) == allowed_exceedances(400, 0.02)
    shifts = [(m.threshold - g.threshold) / g.spread for m, g in zip(moved, gates, strict=True)]
    assert shifts[0] == pytest.approx(shifts[1], abs=1e-5)
    # What is said of prompts that were not fitted on is said of the moved threshold.
    expected = [float((part > shifts[0]).double().mean()) for part in (seen + 1, seen - 1)]
    assert moved[0].unseen_rates == pytest.approx(expected)
    assert expected[0] != pytest.approx(float((seen + 1 > 0).double().mean()))


@pytest.mark.parametrize(
    ("found_in_vlm", "kept"),
    [(slice(0, 0), ["text"]), (slice(50, 100), ["text"]), (slice(0, 90), ["text", "vlm"])],
)
def test_a_gate_in_the_vlm_stays_if_it_finds_more_than_it_costs(
    found_in_vlm: slice, kept: list[str]
) -> None:
    """Its scores of harmless questions are far above those of the text gate, so with it the text
    gate's threshold moves from 0.99 to 2.99 units, past all harmful scores: then it must find more
    than the upper half of the requests, which the text gate finds alone."""
    harmless = torch.stack([torch.linspace(0, 1, 1000), torch.linspace(2, 3, 1000).flip(0)], 1)
    text, in_vlm = (GateFit((layer,), torch.ones(1, 1), 0.0) for layer in (0, 1))
    harmful = torch.stack([torch.linspace(0, 2, 100), torch.full((100,), -9.0)], 1)
    harmful[found_in_vlm, 1] = 9.0
    gates = useful_gates({"text": text, "vlm": in_vlm}, harmless, 0.02, harmful)
    assert list(gates) == kept
    allowed = allowed_exceedances(1000, 0.02)
    highest = harmless[:, : len(kept)].max(1).values.sort(descending=True).values
    assert gates["text"].threshold == pytest.approx(float(highest[allowed]))


def test_the_page_shows_every_row_with_its_counts() -> None:
    rows = [FormResult("one", "text", "text", "3-9", 0.91, wilson(7, 10))]
    rows.append(FormResult("one", "vlm", "blank", "4", 0.5, wilson(2, 10)))
    together = {"blank": {"found": wilson(8, 10), "stopped": wilson(0, 50)}}
    text = page("embedded", rows, together, Budget())
    assert "| one | text | any | 3-9 | 0.910 | 70.0%" in text and "(2/10)" in text
    assert "| blank | 80.0%" in text and "(0/50)" in text
    assert facts(rows, together)["calibrated"]["blank"]["found"]["count"] == 8


def test_the_study_finds_harm_where_it_is_planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one layer's states, but for requests beside a blank picture."""
    harmful = {p.prompt for part in ("fit", "held") for p in calibration(part) if p.harmful}
    generator = torch.Generator().manual_seed(0)

    def states(_: object, asked: list[Query], *__: object, **___: object) -> torch.Tensor:
        found = torch.randn(len(asked), 4, 8, generator=generator)
        for row, one in enumerate(asked):
            blank = one.image is not None and len(one.image.getcolors(2) or "12") == 1
            found[row, 1, 0] += 8 * (one.text in harmful and not blank)
        return found

    def anchors(*_: object) -> tuple[torch.Tensor, list[int]]:
        found = torch.randn(2, 60, 4, 8, generator=generator)
        found[0, :, 1, 0] += 8
        return found, [5]

    def recorded(
        loaded: object, asked: list[Query], openings: list[int], *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        intents = [-1.0 if one.text in harmful else -9.0 for one in asked]
        signs = torch.tensor([[intent, 0.0] for intent in intents])
        return states(loaded, asked), signs if openings else None

    monkeypatch.setattr(hidden_states, "record", states)
    for module in (hidden_states, gate_choice, gate_forms):
        monkeypatch.setattr(module, "record_signs", recorded)
    monkeypatch.setattr(hidden_states, "record_anchors", anchors)
    monkeypatch.setattr(hidden_states, "MAX_RANK", 4)
    monkeypatch.setattr(gate_choice, "answered", lambda _, asked, *__: [True] * len(asked))
    effort = Effort(worded=200, pictured=200, bound=200)
    rows, together = gate_forms.study(None, Budget(), effort, Progress(quiet=True))  # type: ignore[arg-type]
    held = [p for p in calibration("held") if "text" in settings_of(p)]
    shares = {(r.form, r.source, r.setting): r.found.count / r.found.n for r in rows}
    assert {r.found.n for r in rows} == {sum(p.harmful for p in held)}
    of_text_alone = sum(form.intent for form in gate_forms.FORMS)
    assert len(shares) == len(rows) == len(gate_forms.FORMS) * 4 - 3 * of_text_alone
    for (_, source, setting), share in shares.items():
        assert share < 0.2 if (source, setting) == ("vlm", "blank") else share > 0.95
    for rates in together.values():  # the text-only pass reads the words of every request
        assert rates["found"].count > 0.95 * rates["found"].n
        assert rates["stopped"].count < 0.05 * rates["stopped"].n
        assert rates["stopped"].n == sum(not p.harmful for p in held)
