"""A soft gate gives each row its part of the dose, by every mode and kind of gate."""

import pytest
import torch
from pydantic import ValidationError

from tests import tiny
from tests.reference import Reference
from tests.test_session import GATES, MODES, NEW, calibrated, generate
from vlm_safeguard.artifact.config import Steering
from vlm_safeguard.evaluation.defenses.variants import with_steering

CLOSE = {"atol": 2e-4, "rtol": 1e-3}


def softened(model, gates, mode, dose="generated-3"):
    """A guard that gives some of the requests a part of the dose, some all, some none."""
    made, hard = calibrated(model, gates, mode, dose)
    scores = []
    for reference in hard:
        for index, gate in enumerate(made.config.gates):
            known = reference.known.scores[index].values()
            scores += known if gate.per_layer else [sum(known)]
    opened = sorted(score for score in scores if score > 0)
    made = with_steering(made, soft=(opened[-2] + opened[-1]) / 2)
    references = [Reference(model, made, prompt) for prompt in tiny.PROMPTS]
    given = [reference.share(layer) for reference in references for layer in (2, 4)]
    assert min(given) == 0 and any(0 < share < 1 for share in given) and max(given) == 1
    return made, references


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gates", GATES)
def test_each_row_gets_its_part(model, gates, mode):
    made, references = softened(model, gates, mode)
    with made.attach(model) as session:
        runs = [generate(model, tiny.batch(tiny.PROMPTS), use_cache=c) for c in (True, False)]
        rows = session.attestation.rows
    for tokens, logits in runs:
        for row, (answer, table) in enumerate(zip(tokens.tolist(), logits, strict=True)):
            expected = references[row].logits(answer[:-1])[-NEW:]
            torch.testing.assert_close(table, expected, **CLOSE)
    for row, reference in zip(rows, references, strict=True):
        assert row.shares.keys() == row.changed.keys()
        for layer, share in row.shares.items():
            assert share == pytest.approx(reference.share(layer), abs=1e-4)


@pytest.mark.parametrize("gates", ["text", "both"])
@pytest.mark.parametrize("mode", ["add-text", "restore-text"])
def test_each_row_gets_its_part_at_every_position(model, gates, mode):
    made, references = softened(model, gates, mode, "all-3")
    with made.attach(model):
        tokens, logits = generate(model, tiny.batch(tiny.PROMPTS))
    for row, (answer, table) in enumerate(zip(tokens.tolist(), logits, strict=True)):
        expected = references[row].logits(answer[:-1])[-NEW:]
        torch.testing.assert_close(table, expected, **CLOSE)


def test_a_row_alone_gets_what_it_gets_in_a_batch(model):
    made, _ = softened(model, "both", "restore-text")
    with made.attach(model):
        _, together = generate(model, tiny.batch(tiny.PROMPTS), num_return_sequences=1)
        for row, prompt in enumerate(tiny.PROMPTS):
            _, alone = generate(model, tiny.batch([prompt]))
            torch.testing.assert_close(together[row], alone[0], **CLOSE)


def test_a_hard_gate_gives_all_and_says_so(model):
    made, references = calibrated(model, "both", "restore-text", "generated-3")
    with made.attach(model) as session:
        generate(model, tiny.batch(tiny.PROMPTS))
        rows = session.attestation.rows
    for row, reference in zip(rows, references, strict=True):
        assert row.shares == (dict.fromkeys((2, 4), 1.0) if reference.fired else {})


@pytest.mark.parametrize("soft", [-1.0, float("nan"), float("inf"), 1e21])
def test_widths_that_are_none(soft):
    with pytest.raises(ValidationError):
        Steering(mode="add", layers=[1], soft=soft)


def test_what_defers_has_no_dose_to_give_a_part_of():
    with pytest.raises(ValidationError, match="no dose"):
        Steering(mode="defer", soft=1.0)
