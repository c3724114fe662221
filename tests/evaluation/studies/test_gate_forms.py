"""The comparison of gates: its common false-positive rate, its page, and the thresholds set on
questions of their own."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import checkpoint
from tests.command import run
from vlm_safeguard.calibration import gate_choice, hidden_states
from vlm_safeguard.calibration.budget import Budget, Effort
from vlm_safeguard.calibration.conformal import allowed_exceedances, conformal_threshold
from vlm_safeguard.calibration.gate_choice import FittedGates, useful_gates
from vlm_safeguard.calibration.gate_fitting import GateFit
from vlm_safeguard.calibration.recorded_states import Readings, Recorded, States
from vlm_safeguard.data.inputs import SETTINGS, Query, settings_of
from vlm_safeguard.data.prompts import calibration
from vlm_safeguard.evaluation.studies import gate_forms
from vlm_safeguard.evaluation.studies.gate_forms import (
    Comparison,
    FormResult,
    PaperGate,
    at_false_positives,
    facts,
    intent_alone,
    page,
    paper_gate,
)
from vlm_safeguard.evaluation.studies.provenance import made_with, provenance
from vlm_safeguard.model.loading import load
from vlm_safeguard.runtime.gate import refusal_signs
from vlm_safeguard.utils.progress import Progress
from vlm_safeguard.utils.stats import Rate, wilson

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
    gates = useful_gates(FittedGates([text], in_vlm), harmless, 0.02, harmful)
    assert list(gates) == kept
    allowed = allowed_exceedances(1000, 0.02)
    highest = harmless[:, : len(kept)].max(1).values.sort(descending=True).values
    assert gates["text"].threshold == pytest.approx(float(highest[allowed]))


def some_states(seed: int, counts: tuple[int, int]) -> States:
    """Random states of harmful and then harmless prompts, apart along one axis in layer 1."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(counts)
    harmful = torch.arange(total) < counts[0]
    states = torch.randn(total, 3, 6, generator=generator)
    states[harmful, 1, 2] += 1.0
    states[..., 2] += 0.4  # on one side of 0, as a model's states are
    counted = torch.rand(total, generator=generator) < 0.8
    ids = tuple(map(str, range(total)))
    return States(ids, states, harmful, torch.arange(total) % 5, counted | harmful)


def recorded(text: States, pictured: dict[str, States], openings: list[int]) -> Recorded:
    generator = torch.Generator().manual_seed(9)
    directions = {n: torch.linalg.qr(torch.randn(6, 6, generator=generator))[0] for n in range(3)}
    directions[1] = torch.eye(6)[[2, 0, 1]]
    none = Readings(torch.empty(0, 3, 6), torch.empty(0, 2), torch.empty(0, 2, dtype=torch.long))
    pairs = torch.zeros(2, 4, 3, 6)
    return Recorded(pairs, directions, openings, text, none, pictured, frozenset[str]())


def rate_at_zero(parts: Sequence[States], layer: int, vector: torch.Tensor, label: bool) -> Rate:
    """On how many of the counted prompts of a label h_l . v_1 > 0, in float64."""
    opened = [
        sum(float(h) * float(v) for h, v in zip(row[layer], vector, strict=True)) > 0
        for part in parts
        for row, harmful, counts in zip(part.states, part.harmful, part.counted, strict=True)
        if counts and bool(harmful) == label
    ]
    return wilson(sum(opened), len(opened))


@pytest.mark.parametrize("source", ["text", "vlm"])
def test_the_papers_gate_opens_above_zero_layer_by_layer(source: Literal["text", "vlm"]) -> None:
    pictured = {"blank": some_states(1, (30, 40)), "picture": some_states(2, (30, 40))}
    made, held = recorded(some_states(0, (50, 60)), pictured, []), some_states(3, (70, 90))
    row = paper_gate(source, "picture", made, held)
    fitted = [made.text] if source == "text" else list(pictured.values())
    every = replace(held, counted=torch.ones(160, dtype=torch.bool))
    gains, found, stopped = [], [], []
    for layer in range(3):
        vector = made.directions[layer][0]
        high, low = (rate_at_zero(fitted, layer, vector, label).value for label in (True, False))
        gains.append(high - low)
        found.append(rate_at_zero([every], layer, vector, True))
        stopped.append(rate_at_zero([every], layer, vector, False))
    best = gains.index(max(gains))
    assert (row.source, row.setting, row.layer) == (source, "picture", best)
    assert (row.found, row.stopped) == (found[best], stopped[best])
    assert row.mean_found == pytest.approx(sum(r.value for r in found) / 3)
    assert row.mean_stopped == pytest.approx(sum(r.value for r in stopped) / 3)
    assert best == 1 and row.stopped.n == 90 and row.stopped.value > 0.5  # what the 0 costs here


def test_the_intent_alone_is_the_log_probability_of_a_refusals_first_tokens() -> None:
    generator = torch.Generator().manual_seed(5)
    held = some_states(3, (40, 50))
    logits = 3 * torch.randn(90, 7, generator=generator)
    logits[held.harmful, 4] += 6.0
    openings = [1, 4]
    held = replace(held, signs=refusal_signs(logits, torch.tensor(openings)))
    gate = intent_alone(recorded(held, {}, openings))
    expected = [
        math.log(sum(math.exp(row[t]) for t in openings) / sum(map(math.exp, row)))
        for row in logits.tolist()
    ]
    assert gate.scores(held.states, held.signs).tolist() == pytest.approx(expected, abs=1e-5)
    row = gate_forms._judge("intent", "text", "text", gate, held)
    harmful, harmless = expected[:40], expected[40:]
    pairs = [h > s for h in harmful for s in harmless]
    assert row.auc == pytest.approx(sum(pairs) / len(pairs)) and 0.6 < row.auc < 1
    assert row.layers == "none"
    # One in a hundred of 50 prompts is none.
    assert row.found == wilson(sum(h > max(harmless) for h in harmful), 40)


def test_the_page_shows_every_row_with_its_counts() -> None:
    forms = [FormResult("one", "text", "text", "3-9", 0.91, wilson(7, 10))]
    forms.append(FormResult("one", "vlm", "blank", "4", 0.5, wilson(2, 10)))
    paper = [PaperGate("text", "text", 4, wilson(9, 10), wilson(20, 50), 0.75, 0.5)]
    paper.append(PaperGate("vlm", "blank", 5, wilson(10, 10), wilson(50, 50), 1.0, 0.995))
    calibrated: Any = {"blank": {"found": wilson(8, 10), "stopped": wilson(0, 50)}}
    made = {"commit": "abc", "version": "1", "weights_sha256": "12", "template_sha256": "34"}
    found = Comparison(forms, paper, calibrated)
    text = page("embedded", found, made, Budget())
    assert "| one | text | any | 3-9 | 0.910 | 70.0%" in text and "(2/10)" in text
    assert "| text | any | 4 | 90.0%" in text and "(20/50) | 75.0% | 50.0% |" in text
    assert "| vlm | blank | 5 | 100.0%" in text and "(50/50) | 100.0% | 99.5% |" in text
    assert "| blank | 80.0%" in text and "(0/50)" in text
    assert text.endswith(f"Made with: {made_with(made)}.\n")
    plain = json.loads(json.dumps(facts(found, made)))
    assert plain["calibrated"]["blank"]["found"]["count"] == 8
    assert plain["paper"][0]["stopped"]["count"] == 20 and plain["made_with"] == made


def test_the_command_names_what_it_was_made_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoint.save(tmp_path / "model")
    found = Comparison([FormResult("one", "text", "text", "3", 0.5, wilson(1, 2))], [], {})
    monkeypatch.setattr(gate_forms, "study", lambda *_, **__: found)
    done = run("gates", model, "-o", "page.md", "--quiet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = provenance(load(model))
    assert done.stdout == page(str(model), found, made, Budget())
    assert (tmp_path / "page.md").read_text() == done.stdout
    done = run("gates", model, "--json", "--quiet", cwd=tmp_path)
    assert json.loads(done.stdout) == facts(found, made)


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

    def anchors(*_: object) -> tuple[torch.Tensor, torch.Tensor]:
        found = torch.randn(2, 60, 4, 8, generator=generator)
        found[0, :, 1, 0] += 8
        return found, torch.zeros(120, dtype=torch.long)

    def record_signs(
        loaded: object, asked: list[Query], openings: list[int], *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        intents = [-1.0 if one.text in harmful else -9.0 for one in asked]
        signs = torch.tensor([[intent, 0.0] for intent in intents])
        return states(loaded, asked), signs if openings else None

    monkeypatch.setattr(hidden_states, "record", states)
    for module in (hidden_states, gate_choice, gate_forms):
        monkeypatch.setattr(module, "record_signs", record_signs)
        monkeypatch.setattr(module, "find_frame", lambda _: None)
    monkeypatch.setattr(hidden_states, "find_decoder", lambda _: SimpleNamespace(hidden_size=8))
    monkeypatch.setattr(hidden_states, "record_anchors", anchors)
    monkeypatch.setattr(hidden_states, "learn_openings", lambda *_: [5])
    monkeypatch.setattr(hidden_states, "MAX_RANK", 4)
    monkeypatch.setattr(gate_choice, "answered", lambda _, asked, *__: [True] * len(asked))
    effort = Effort(worded=200, pictured=200, bound=200)
    loaded: Any = SimpleNamespace(processor=None, model=None)
    found = gate_forms.study(loaded, Budget(), effort, Progress(quiet=True))
    rows = found.forms
    held = [p for p in calibration("held") if "text" in settings_of(p)]
    shares = {(r.form, r.source, r.setting): r.found.count / r.found.n for r in rows}
    assert {r.found.n for r in rows} == {sum(p.harmful for p in held)}
    of_text_alone = sum(form.intent for form in gate_forms.FORMS)
    assert len(shares) == len(rows) == len(gate_forms.FORMS) * 4 - 3 * of_text_alone
    for (_, source, setting), share in shares.items():
        assert share < 0.2 if (source, setting) == ("vlm", "blank") else share > 0.95
    assert {r.layers for r in rows if r.form == "refusal intent alone"} == {"none"}
    places = [(r.source, r.setting) for r in found.paper]
    assert places == [("text", "text"), *(("vlm", setting) for setting in SETTINGS)]
    for one in found.paper:  # half of all states without harm lie above 0 anyway
        assert one.layer == 1 and one.stopped.value == pytest.approx(0.5, abs=0.12)
        blank = one.setting == "blank"
        assert one.found.value == pytest.approx(0.5 if blank else 1.0, abs=0.12 if blank else 0.01)
    for rates in found.calibrated.values():  # the text-only pass reads the words of every request
        assert rates["found"].count > 0.95 * rates["found"].n
        assert rates["stopped"].count < 0.05 * rates["stopped"].n
        assert rates["stopped"].n == sum(not p.harmful for p in held)
