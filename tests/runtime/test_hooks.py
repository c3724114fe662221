"""Hooks that are removed, bypassed or half attached: nothing goes round the guard."""

import pytest
import torch
from torch import nn

from tests import tiny
from tests.reference import holds
from tests.runtime.threads import Stops
from tests.tiny import NEW, TEXTS, always, generate
from vlm_safeguard.errors import GuardError, GuardRuntimeError
from vlm_safeguard.model.residual_stream import find_decoder

# -- caches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before any request", "after one", "after a refused one"])
@pytest.mark.parametrize("which", ["the class's", "kept", "kept and chunked"])
def test_a_generate_that_goes_round_the_guard_is_refused(model, texts, which, when):
    """It would skip the check of the settings: in chunks, its first would pass for the prompt."""
    made, references = texts
    inputs = tiny.batch(TEXTS)
    kept = type(model).generate.__get__(model) if which == "the class's" else model.generate
    chunk = {"prefill_chunk_size": 3} if "chunked" in which else {}
    seen = []
    with made.attach(model) as session:
        if when != "before any request":
            generate(model, inputs)
        if when == "after a refused one":
            with pytest.raises(GuardRuntimeError, match="leave it out"):
                generate(model, inputs, penalty_alpha=0.6)
        handle = model.lm_head.register_forward_hook(lambda *_: seen.append(1))
        with pytest.raises(GuardRuntimeError, match=r"call model\.generate"):
            kept(**inputs, max_new_tokens=NEW, **chunk)
        handle.remove()
        assert not seen  # nothing ran
        holds(references, *generate(model, inputs))
        assert [d.fired for d in session.decisions] == [r.fired for r in references]
    assert torch.equal(kept(**inputs, max_new_tokens=1), model.generate(**inputs, max_new_tokens=1))


def test_a_generate_of_the_class_inside_a_guarded_one_is_refused(model):
    """Its prompt, as long as the request is then, would pass for one more step of it."""
    ids = torch.tensor([tiny.words(0, 6)])
    longer = torch.tensor([tiny.words(1, 8)])
    with always(model).attach(model):

        def within():
            with pytest.raises(GuardRuntimeError, match="inside generate"):
                type(model).generate(model, longer, max_new_tokens=1, use_cache=False)

        for use_cache in (True, False):
            streamer = Stops(within)
            model.generate(ids, max_new_tokens=NEW, streamer=streamer, use_cache=use_cache)
            assert streamer.there.is_set()


def test_what_prepares_calls_is_left_as_it_was(model, monkeypatch):
    """Also one of the model's own instance, and after an exception in generate."""

    class Stop(Exception):
        pass

    def stop():
        raise Stop

    own = model.prepare_inputs_for_generation
    ids = torch.tensor([tiny.words(0, 6)])
    with always(model).attach(model):
        kept = model.prepare_inputs_for_generation
        with pytest.raises(Stop):
            model.generate(ids, streamer=Stops(stop), max_new_tokens=NEW)
    assert "prepare_inputs_for_generation" not in model.__dict__
    kept(ids)  # no guard is on the model any more
    monkeypatch.setattr(model, "prepare_inputs_for_generation", own)
    with always(model).attach(model):
        model.generate(ids, max_new_tokens=2)
    assert model.__dict__["prepare_inputs_for_generation"] is own


def test_what_prepares_calls_cannot_be_taken_away(model, monkeypatch):
    ids = torch.tensor([tiny.words(0, 6)])
    own = model.prepare_inputs_for_generation
    with always(model).attach(model):
        monkeypatch.setattr(model, "prepare_inputs_for_generation", own)
        for call in (model.generate, type(model).generate.__get__(model)):
            with pytest.raises(GuardRuntimeError, match="attach the guard last"):
                call(ids, max_new_tokens=2)
        monkeypatch.undo()
        model.generate(ids, max_new_tokens=2)


# -- threads -----------------------------------------------------------------------------------


def test_a_generate_kept_from_before_the_end_is_refused(model):
    with always(model).attach(model):
        kept = model.generate
    with pytest.raises(GuardRuntimeError, match="detached"):
        kept(**tiny.batch(tiny.PROMPTS))
    generate(model, tiny.batch(tiny.PROMPTS))


def test_leaving_inside_a_generation_is_refused(model, mixed):
    made, references = mixed
    inputs = tiny.batch(tiny.PROMPTS[:1])
    with made.attach(model) as session:

        def leave():
            with pytest.raises(GuardRuntimeError, match="inside"):
                session.detach()

        holds(references[:1], *generate(model, inputs, streamer=Stops(leave)))


# -- hooks that go or do not come --------------------------------------------------------------


def _hooks(model):
    return [
        (name, dict(module._forward_hooks), dict(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("place", ["model", "layer", "everything"])
def test_hooks_that_are_removed_in_the_middle(place):
    model = tiny.llava()

    def remove():
        if place == "model":
            del model.forward  # the one that a guard puts in place of the class's
        elif place == "layer":
            find_decoder(model).layers[4]._forward_hooks.clear()
        else:
            for module in model.modules():
                module._forward_hooks.clear()
                module._forward_pre_hooks.clear()

    inputs, streamer = tiny.batch(tiny.PROMPTS[:1]), Stops(remove)
    with always(model).attach(model) as session:
        with pytest.raises(GuardRuntimeError):
            generate(model, inputs, streamer=streamer)
        assert session._request is None
    assert streamer.calls == 3  # nobody gets a token from behind that place
    assert "generate" not in model.__dict__


def test_a_forward_call_without_any_hooks_is_refused():
    """Without hooks torch calls ``forward`` right away."""
    model = tiny.llava()
    inputs = tiny.batch(tiny.PROMPTS[:1])
    with always(model).attach(model) as session:
        model(**inputs)
        for module in model.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        with pytest.raises(GuardRuntimeError, match="hooks"):
            model(**inputs)
        assert session.attestation is None


def test_a_layer_left_out_for_another_run_twice():
    """The number of calls alone would look right."""
    model = tiny.llava()
    decoder = find_decoder(model)
    made = always(model, reference="anchor", layers=[2, 3])
    with made.attach(model):
        model(**tiny.batch(tiny.PROMPTS), use_cache=False)
        layers = list(decoder.layers)
        decoder.module.layers = nn.ModuleList([*layers[:3], layers[2], *layers[4:]])
        with pytest.raises(GuardRuntimeError, match="withheld"):
            model(**tiny.batch(tiny.PROMPTS), use_cache=False)


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_a_half_attached_guard_is_taken_out_again(model, monkeypatch, fails):
    made = always(model, layers=[1, 2, 4])
    before, calls = _hooks(model), []
    register = nn.Module.register_forward_hook

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == fails:
            raise MemoryError("on purpose")
        return register(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "register_forward_hook", failing)
    with pytest.raises(MemoryError), made.attach(model):
        pass
    monkeypatch.undo()
    assert _hooks(model) == before
    assert not {"generate", "prepare_inputs_for_generation"} & set(model.__dict__)
    with made.attach(model) as session:
        generate(model, tiny.batch(tiny.PROMPTS))
        assert all(d.fired for d in session.decisions)


def test_attached_again_and_again(model, mixed):
    made, references = mixed
    before = _hooks(model)
    for _ in range(3):
        with made.attach(model):
            holds(references, *generate(model, tiny.batch(tiny.PROMPTS)))
            with pytest.raises(GuardError, match="already"), made.attach(model):
                pass
            with pytest.raises(GuardError, match="already"), always(model).attach(model):
                pass
        assert _hooks(model) == before
