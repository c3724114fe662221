"""Hard and soft gates compared: the lower threshold, the counts, a run on a tiny guard."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import checkpoint, tiny
from vlm_safeguard.calibration.attack_trials import within
from vlm_safeguard.calibration.budget import Effort
from vlm_safeguard.calibration.generation import respond
from vlm_safeguard.data.inputs import requests
from vlm_safeguard.data.prompts import calibration
from vlm_safeguard.errors import GuardError
from vlm_safeguard.evaluation.defenses.variants import with_thresholds
from vlm_safeguard.evaluation.studies import soft_gates
from vlm_safeguard.evaluation.studies.soft_gates import SoftRow, lower, section
from vlm_safeguard.model.loading import load
from vlm_safeguard.utils.progress import Progress
from vlm_safeguard.utils.stats import wilson


@given(
    st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=120),
    st.sampled_from([0.0, 0.05, 0.3]),
)
def test_the_lower_threshold_opens_for_the_share_at_most(values: list[float], share: float) -> None:
    scores = torch.tensor(values)
    moved = lower(scores, share)
    assert moved <= 0
    if moved < 0:
        assert int((scores > moved).sum()) <= share * len(values)


def test_counts_of_each_label_are_kept_apart() -> None:
    harmful = [True, True, True, False, False]
    refused = [True, False, False, True, False]
    opened = [True, True, False, True, False]
    row = soft_gates._row("x", -1.0, 2.0, refused, opened, harmful)
    assert (row.attacks, row.over_refusal, row.opened) == (wilson(2, 3), wilson(1, 2), wilson(1, 2))


def test_the_page_shows_threshold_width_and_counts() -> None:
    row = SoftRow("soft, own threshold", -1.5, 3.0, wilson(2, 3), wilson(0, 4), wilson(1, 4))
    assert "| soft, own threshold | -1.5 | 3.0 | 66.7%" in section([row])


def test_thresholds_move_once_for_a_pooled_gate_and_in_every_layer_else(model) -> None:
    gates = [tiny.gate("text", 1, 3, threshold=2.0), tiny.gate("vlm", 2, 4, per_layer=True)]
    moved = with_thresholds(tiny.guard(model, gates), -0.5).config.gates
    assert moved[0].thresholds == [1.5, 2.0]
    assert moved[1].thresholds == [-0.5, -0.5]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(checkpoint.save(tmp_path_factory.mktemp("tiny")))


FEW = Effort(proof=3, tokens=3)
QUIET = Progress(quiet=True)


def test_every_combination_is_tried_and_scores_are_those_of_the_gates(loaded) -> None:
    gates = [tiny.gate("text", 1, 3, threshold=25.0), tiny.gate("vlm", 2, threshold=25.0)]
    made = tiny.guard(loaded.model, gates)
    plain, own, soft, low, soft_low, _ = soft_gates.compare(loaded, made, FEW, QUIET)
    assert plain.opened.count == 0 and own.opened == soft.opened and own.shift == 0
    assert low.shift == -soft_low.width < 0
    assert low.opened == soft_low.opened and low.opened.count <= soft_gates.LOWERED * low.opened.n
    # As the guard itself decides: a request opens a gate where its score is above zero.
    nearer = with_thresholds(made, -20.0)
    items = requests(within(calibration("held")[:12], "blank"), "blank")
    scores = soft_gates.gate_scores(loaded, nearer, items, QUIET)
    said = respond(loaded, items, nearer, max_new_tokens=1)
    fired = [one.fired for one in said]
    assert fired == (scores > 0).tolist() and set(fired) == {True, False}


def test_what_has_no_part_of_a_dose_is_refused(loaded) -> None:
    made = tiny.guard(loaded.model, [tiny.gate("vlm", 2, per_layer=True)])
    with pytest.raises(GuardError, match="pooled gates and a dose"):
        soft_gates.compare(loaded, made, FEW, QUIET)
