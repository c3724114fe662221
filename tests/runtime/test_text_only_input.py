"""A text-only prompt that the caller gives: what the guard reads instead of the prompt's words."""

import pytest
import torch

from tests import tiny
from vlm_safeguard.errors import GuardRuntimeError

SHORT = {"max_new_tokens": 3, "do_sample": False}
GATES = [tiny.gate("text", 5, 2)]
STEERING = {"mode": "restore", "reference": "text", "tokens": 1}


def spoken(prompts, side="left"):
    """The prompts as text, padded: what the text-only pass derives by itself."""
    alone = tiny.batch([tiny.without_pictures(p) for p in prompts], side)
    return {
        "text_input_ids": alone["input_ids"],
        "text_attention_mask": alone["attention_mask"],
    }


def scores(session):
    return torch.tensor([d.parts["text.0"] for d in session.decisions])


def test_the_derived_reading_given_by_hand_changes_nothing(model):
    guard = tiny.guard(model, GATES, **STEERING)
    inputs = tiny.batch(tiny.PROMPTS)
    with guard.attach(model) as session:
        plain = model.generate(**inputs, **SHORT)
        expected = scores(session)
        given = model.generate(**inputs, **spoken(tiny.PROMPTS), **SHORT)
        torch.testing.assert_close(scores(session), expected, atol=2e-4, rtol=1e-3)
    assert torch.equal(plain, given)


def test_another_reading_is_what_the_gate_reads(model):
    guard = tiny.guard(model, GATES, **STEERING)
    prompts, others = tiny.PROMPTS[:2], tiny.PROMPTS[2:4]
    with guard.attach(model) as session:
        model.generate(**tiny.batch(others), **SHORT)
        expected = scores(session)
        model.generate(**tiny.batch(prompts), **spoken(others), **SHORT)
        torch.testing.assert_close(scores(session), expected, atol=2e-4, rtol=1e-3)


def test_a_forward_call_takes_it_too_and_the_next_request_does_not_see_it(model):
    guard = tiny.guard(model, GATES, **STEERING)
    prompts, others = tiny.PROMPTS[:2], tiny.PROMPTS[2:4]
    with guard.attach(model) as session, torch.no_grad():
        model(**tiny.batch(prompts))
        own = scores(session)
        model(**tiny.batch(prompts), **spoken(others))
        assert not torch.allclose(scores(session), own, atol=1e-3)
        model(**tiny.batch(prompts))
        torch.testing.assert_close(scores(session), own, atol=2e-4, rtol=1e-3)


def test_embeddings_alone_are_guarded_with_a_reading_and_refused_without(model):
    guard = tiny.guard(model, GATES, **STEERING)
    prompt = [tiny.without_pictures(tiny.PROMPTS[0])]
    inputs = tiny.batch(prompt)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    only = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    with guard.attach(model) as session:
        with pytest.raises(GuardRuntimeError, match="text_input_ids"):
            model.generate(**only, **SHORT)
        said = model.generate(**only, **spoken(prompt), **SHORT)
        embedded = scores(session)
        whole = model.generate(**inputs, **SHORT)
        torch.testing.assert_close(embedded, scores(session), atol=2e-4, rtol=1e-3)
    assert torch.equal(said, whole[:, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"text_attention_mask": t["text_attention_mask"]}, "without text_input_ids"),
        (lambda t: {"text_input_ids": t["text_input_ids"].float()}, "token ids"),
        (lambda t: {"text_input_ids": t["text_input_ids"][0]}, "token ids"),
        (lambda t: {"text_input_ids": t["text_input_ids"][:, :0]}, "token ids"),
        (lambda t: t | {"text_attention_mask": t["text_attention_mask"][:1]}, "shape"),
        (lambda t: {key: value[:1] for key, value in t.items()}, "1 rows"),
    ],
)
def test_a_reading_that_does_not_fit_is_refused(model, change, message):
    guard = tiny.guard(model, GATES, **STEERING)
    with guard.attach(model), pytest.raises(GuardRuntimeError, match=message):
        model.generate(**tiny.batch(tiny.PROMPTS[:2]), **change(spoken(tiny.PROMPTS[:2])), **SHORT)


def test_padding_on_the_right_is_refused(model):
    guard = tiny.guard(model, GATES, **STEERING)
    prompts = sorted(tiny.PROMPTS, key=len)[:: len(tiny.PROMPTS) - 1]
    with guard.attach(model), pytest.raises(GuardRuntimeError, match="on the left"):
        model.generate(**tiny.batch(prompts), **spoken(prompts, "right"), **SHORT)
