"""What the session attests of a request."""

import pytest
import torch

from tests import tiny
from tests.reference import CLOSE, calibrated
from tests.tiny import NEW, always, generate
from vlm_safeguard.errors import GuardRuntimeError
from vlm_safeguard.model.residual_stream import find_decoder


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    ("tokens", "later"), [(1, "same"), (3, "same"), (3, "refusal"), (None, "same")]
)
def test_the_attestation_of_a_generation(model, tokens, later, use_cache):
    made, references = calibrated(model, tiny.PROMPTS, tokens=tokens, later=later)
    with made.attach(model) as session:
        assert session.attestation is None
        generate(model, tiny.batch(tiny.PROMPTS), use_cache=use_cache)
        told = session.attestation
        assert [row.decision for row in told.rows] == session.decisions
    assert told.layers == (2, 4, 5)  # steered 2 and 4, gates at 5 and 2
    assert (told.calls.passes, told.calls.made, told.calls.expected) == (NEW, 3 * NEW, 3 * NEW)
    by_text = any(r.is_open(0, "text") for r in references)
    assert by_text
    assert (told.text_pass.passes, told.text_pass.made, told.text_pass.expected) == (1, 3, 3)
    dose = min(tokens or NEW, NEW)
    for row, reference in zip(told.rows, references, strict=True):
        assert row.changed == ({2: dose, 4: dose} if reference.fired else {})
        for index, gate in enumerate(made.config.gates):
            name, known = f"{gate.source}.{index}", reference.known.scores[index]
            expected = torch.tensor([known[layer] for layer in gate.layers])
            score = torch.tensor(row.decision.scores[name])
            torch.testing.assert_close(torch.tensor(row.decision.parts[name]), expected, **CLOSE)
            decides = expected if gate.per_layer else expected.sum(0, keepdim=True)
            torch.testing.assert_close(score, decides, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_attestation_counts_no_padding(model, side):
    made = always(model, positions="all", tokens=2)
    with made.attach(model) as session:
        model(**tiny.batch(tiny.PROMPTS, side))
        told = session.attestation
    for row, prompt in zip(told.rows, tiny.PROMPTS, strict=True):
        assert row.changed == {2: len(prompt), 4: len(prompt)}


def test_a_gate_inside_the_vlm_steers_the_layers_below_it_one_step_later(model):
    made = tiny.guard(model, [tiny.gate("vlm", 3, threshold=-1e9)], tokens=3, reference="anchor")
    with made.attach(model) as session:
        generate(model, tiny.batch(tiny.PROMPTS))
        rows = session.attestation.rows
    assert all(row.changed == {2: 2, 4: 3} for row in rows)


def test_nothing_is_attested_of_a_request_that_was_refused(model):
    prompt = torch.tensor([tiny.words(1, 5)])
    with always(model).attach(model) as session, torch.no_grad():
        for bad in ({"penalty_alpha": 0.6}, {"text_attention_mask": prompt}):
            generate(model, tiny.batch(tiny.PROMPTS))
            assert session.decisions
            with pytest.raises(GuardRuntimeError):
                model.generate(prompt, max_new_tokens=2, **bad)
            assert session.attestation is None and session.decisions == []
        model(**tiny.batch(tiny.PROMPTS))
        with pytest.raises(GuardRuntimeError):
            model(prompt, text_attention_mask=prompt)
        assert session.attestation is None


def test_a_step_that_fails_is_not_attested(model):
    made = always(model, tokens=None)
    steps = iter([None, None, RuntimeError("out of memory")])

    def fails(*_):
        if error := next(steps):
            raise error

    handle = find_decoder(model).layers[5].mlp.register_forward_hook(fails)
    with made.attach(model) as session:
        with pytest.raises(RuntimeError, match="out of memory"):
            generate(model, tiny.batch(tiny.PROMPTS))
        told = session.attestation
    handle.remove()
    assert told.calls.passes == 2
    assert all(row.changed == {2: 2, 4: 2} for row in told.rows)


def test_nothing_is_attested_of_a_request_that_was_withheld(model):
    with always(model).attach(model) as session:
        generate(model, tiny.batch(tiny.PROMPTS))
        find_decoder(model).layers[4]._forward_hooks.clear()
        with pytest.raises(GuardRuntimeError):
            generate(model, tiny.batch(tiny.PROMPTS))
        assert session.attestation is None
        assert session.decisions == []
