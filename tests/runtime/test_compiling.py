"""Compiled models: guarded where that can be, refused elsewhere."""

from functools import partial

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
)

from tests import tiny
from tests.tiny import always
from vlm_safeguard.errors import GuardError, GuardRuntimeError
from vlm_safeguard.model.residual_stream import find_decoder
from vlm_safeguard.runtime.session import Session

# -- refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize("by_config", [True, False])
def test_generate_does_not_compile_the_model_by_itself(model, monkeypatch, by_config):
    """It would where the cache is static and the device no CPU."""
    asked = []

    def criteria(self, _, config):
        asked.append(config.disable_compile)
        return False

    monkeypatch.setattr(type(model), "_valid_auto_compile_criteria", criteria)
    config = GenerationConfig(max_new_tokens=2, cache_implementation="static")
    options = {"generation_config": config} if by_config else config.to_diff_dict()
    options.pop("transformers_version", None)
    with always(model).attach(model):
        model.generate(**tiny.batch(tiny.PROMPTS), **options)
        model.generate(**tiny.batch(tiny.PROMPTS), **options, disable_compile=False)
    assert asked == [True, True]
    assert config.disable_compile is None


# -- models of other kinds ---------------------------------------------------------------------


def _parts(model):
    return {
        "model": model,
        "decoder": model.model.language_model,
        "layer": model.model.language_model.layers[1],
        "mlp": model.model.language_model.layers[5].mlp,
        "vision": model.model.vision_tower,
    }


@pytest.mark.parametrize("how", ["in place", "forward"])
@pytest.mark.parametrize("part", ["model", "decoder", "layer", "mlp", "vision"])
def test_what_is_compiled_anywhere_is_refused(part, how):
    model = tiny.llava()
    made, module = always(model), _parts(model)[part]
    if how == "in place":
        module.compile(backend="eager")
    else:
        module.forward = torch.compile(module.forward, backend="eager")
    hooks = dict(model._forward_hooks)
    with pytest.raises(GuardError, match="compiled"), made.attach(model):
        pass
    assert dict(model._forward_hooks) == hooks
    assert "generate" not in model.__dict__


def test_a_compiled_layer_in_place_of_a_layer_is_refused():
    model = tiny.llava()
    made, layers = always(model), find_decoder(model).layers
    layers[3] = torch.compile(layers[3], backend="eager")
    with pytest.raises(GuardError), made.attach(model):  # its parameters' names differ as well
        pass
    with pytest.raises(GuardError, match=r"compiled at .*layers\.3"):
        Session(made.config, made.tensors, model)


def _compiled(how, model):
    """Compiled around the model: nothing on it tells of that."""
    whole = {
        "model": model,
        "a function that calls it": lambda **inputs: model(**inputs),
        "its forward": model.forward,
        "its class's forward": partial(type(model).forward, model),
    }
    return torch.compile(whole[how], backend="eager")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["model", "a function that calls it"])
def test_compiled_before_and_called_under_guard(how):
    """What was compiled without hooks is compiled anew, with them."""
    model = tiny.llava(num_hidden_layers=2)
    made = tiny.with_thresholds(
        tiny.guard(model, [tiny.gate("vlm", 0)], layers=[1], reference="anchor"), [[-1e9]]
    )
    inputs = {"input_ids": torch.tensor([tiny.words(0, 6)])}
    with torch.no_grad():
        with made.attach(model):
            expected = model(**inputs).logits
        compiled = _compiled(how, model)
        plain = compiled(**inputs).logits
        with made.attach(model) as session:
            torch.testing.assert_close(compiled(**inputs).logits, expected)
            assert [d.fired for d in session.decisions] == [True]
        assert not torch.allclose(plain, expected)
        torch.testing.assert_close(compiled(**inputs).logits, plain)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["its forward", "its class's forward"])
def test_a_compiled_forward_from_before_is_refused(how):
    """It goes round the model's own hooks."""
    model = tiny.llava(num_hidden_layers=2)
    made = tiny.guard(model, [tiny.gate("vlm", 0)], layers=[1], reference="anchor")
    inputs = {"input_ids": torch.tensor([tiny.words(0, 6)])}
    compiled = _compiled(how, model)
    with torch.no_grad():
        compiled(**inputs)
        with made.attach(model), pytest.raises(GuardRuntimeError, match="outside"):
            compiled(**inputs)
    torch._dynamo.reset()


def test_compiled_after_attaching():
    """Twice under guard, with the gate open and shut; free of it afterwards."""
    torch._dynamo.reset()
    model = tiny.llava(num_hidden_layers=2)
    scores = []
    prompts = [tiny.words(0, 6), tiny.words(1, 6)]
    made = tiny.guard(model, [tiny.gate("vlm", 0)], layers=[1], reference="anchor")
    inputs = [{"input_ids": torch.tensor([prompt])} for prompt in prompts]
    with torch.no_grad(), made.attach(model) as session:
        for one in inputs:
            model(**one)
            scores.append(session.decisions[0].scores["vlm.0"][0])
    made = tiny.with_thresholds(made, [[sum(scores) / 2]])
    with torch.no_grad():
        plain = [model(**one).logits for one in inputs]
        with made.attach(model):
            expected = [model(**one).logits for one in inputs]
        with made.attach(model) as session:
            compiled, fired = torch.compile(model, backend="eager"), []
            for one, logits in zip(inputs, expected, strict=True):
                torch.testing.assert_close(compiled(**one).logits, logits)
                fired.append(session.decisions[0].fired)
        assert sorted(fired) == [False, True]
        for one, logits in zip(inputs, plain, strict=True):
            torch.testing.assert_close(compiled(**one).logits, logits)
    torch._dynamo.reset()


@pytest.mark.parametrize("tokens", [2, None])
def test_compiled_after_attaching_and_decoding_step_by_step(tokens):
    """Steps in which the layers steer, and in which they have nothing to do, in turns."""
    model = tiny.llava(num_hidden_layers=2)
    made = tiny.guard(model, [tiny.gate("vlm", 0)], layers=[0, 1], reference="anchor")
    inputs = [{"input_ids": torch.tensor([tiny.words(seed, 6)])} for seed in (0, 1, 2, 0)]

    def decoded(call):
        tables = []
        for one in inputs:
            out = call(**one, past_key_values=DynamicCache())
            for _ in range(4):
                tables.append(out.logits[:, -1])
                token = tables[-1].argmax(-1, keepdim=True)
                out = call(input_ids=token, past_key_values=out.past_key_values)
        return torch.cat(tables)

    scores = []
    with torch.no_grad(), made.attach(model) as session:
        for one in inputs[:3]:
            model(**one)
            scores.append(session.decisions[0].scores["vlm.0"][0])
    middle = sum(sorted(scores)[:2]) / 2  # one of the three stays shut
    made = tiny.guard(
        model,
        [tiny.gate("vlm", 0, threshold=middle)],
        layers=[0, 1],
        reference="anchor",
        tokens=tokens,
    )
    torch._dynamo.reset()
    with torch.no_grad():
        with made.attach(model):
            expected = decoded(model)
        with made.attach(model) as session:
            torch.testing.assert_close(decoded(torch.compile(model, backend="eager")), expected)
            told = session.attestation
    assert told.calls.made == told.calls.expected == 2 * 5
    torch._dynamo.reset()
