"""Adapters: a guard belongs to those that are active."""

import pytest
import torch

from tests import tiny
from tests.reference import calibrated, holds
from tests.tiny import always, generate
from vlm_safeguard.errors import GuardError, GuardRuntimeError, ModelError


def _lora():
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    return peft, settings


def test_an_adapter_on_the_model_needs_a_guard_of_its_own():
    _, settings = _lora()
    model = tiny.llava()
    without = always(model)
    model.add_adapter(settings)
    with pytest.raises(GuardError, match="weights differ"), without.attach(model):
        pass
    made, references = calibrated(model, tiny.PROMPTS)  # of the model with its adapter
    with made.attach(model):
        holds(references, *generate(model, tiny.batch(tiny.PROMPTS)))


def test_an_adapter_that_comes_under_guard_is_noticed():
    _, settings = _lora()
    model = tiny.llava()
    with always(model).attach(model):
        generate(model, tiny.batch(tiny.PROMPTS))
        model.add_adapter(settings)
        with pytest.raises(GuardRuntimeError, match="adapter"):
            generate(model, tiny.batch(tiny.PROMPTS))


@pytest.mark.parametrize("place", ["model", "decoder", "a module of its own"])
def test_an_adapter_that_comes_around_a_part_is_noticed(place):
    peft, settings = _lora()
    model = tiny.llava()
    with always(model).attach(model):
        generate(model, tiny.batch(tiny.PROMPTS))
        if place == "model":
            peft.get_peft_model(model, settings)
        elif place == "decoder":
            inner = model.model.language_model
            model.model.language_model = peft.get_peft_model(inner, settings)
        else:  # as one that was loaded with its adapter already
            projector = torch.nn.Sequential(model.model.multi_modal_projector)
            projector.peft_config = {"default": settings}
            model.model.multi_modal_projector = projector
        with pytest.raises(GuardRuntimeError, match="adapter"):
            generate(model, tiny.batch(tiny.PROMPTS))


def _two_adapters():
    """A model with two adapters at work, and what brings it into another state."""
    _, settings = _lora()
    model = tiny.llava()
    names = ["first", "second"]
    for name in names:
        model.add_adapter(settings, name)

    def switch(how):
        model.set_adapter([how] if how in names else names)
        model.enable_adapters()
        if how == "none":
            model.disable_adapters()

    switch("both")
    return model, switch


@pytest.mark.parametrize("known", ["both", "first", "none"])
def test_a_guard_belongs_to_the_adapters_at_work(known):
    model, switch = _two_adapters()
    switch(known)
    made = always(model)
    for how in ("first", "none", "second", "both"):
        switch(how)
        if how == known:
            with made.attach(model):
                generate(model, tiny.batch(tiny.PROMPTS))
        else:
            with pytest.raises(GuardError, match="weights differ"), made.attach(model):
                pass


def _scaled(model, scale):
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["first"] = scale


def test_an_adapters_scale_is_a_part_of_the_model():
    model, _ = _two_adapters()
    made = always(model)
    inputs = tiny.batch(tiny.PROMPTS)
    with made.attach(model):
        generate(model, inputs)
        _scaled(model, 0.5)
        with pytest.raises(GuardRuntimeError, match="switched"):
            generate(model, inputs)
    with pytest.raises(GuardError, match="weights differ"), made.attach(model):
        pass


def test_an_adapter_on_the_language_model_alone_counts():
    _, settings = _lora()
    model = tiny.llava()
    model.model.language_model.add_adapter(settings, "first")
    made = always(model)
    _scaled(model, 0.5)
    with pytest.raises(GuardError, match="weights differ"), made.attach(model):
        pass


def test_a_module_trained_whole_may_have_a_scale_of_its_own():
    """PEFT's wrapper lends the attributes of what it wraps: attention calls its factor a scale."""
    peft, _ = _lora()
    model = tiny.llava()
    both = peft.LoraConfig(target_modules=["gate_proj"], modules_to_save=["self_attn"], r=2)
    wrapped = peft.get_peft_model(model, both).eval()
    with always(model).attach(model):
        generate(wrapped, tiny.batch(tiny.PROMPTS))


@pytest.mark.parametrize("how", ["first", "none"])
def test_an_adapter_that_is_switched_under_guard_is_noticed(how):
    model, switch = _two_adapters()
    inputs = tiny.batch(tiny.PROMPTS)
    with always(model).attach(model):
        generate(model, inputs)
        switch(how)
        for call in (lambda: generate(model, inputs), lambda: model(**inputs)):
            with pytest.raises(GuardRuntimeError, match="switched"):
                call()
        switch("both")
        generate(model, inputs)


def test_an_adapter_for_each_row_is_noticed():
    peft, settings = _lora()
    model = tiny.llava()
    wrapped = peft.get_peft_model(model, settings).eval()
    inputs = tiny.batch(tiny.PROMPTS)
    rows = ["default", "__base__"] * (len(tiny.PROMPTS) // 2)
    with always(model).attach(model), pytest.raises(GuardRuntimeError, match="switched"):
        wrapped.generate(**inputs, adapter_names=rows, max_new_tokens=2)


def test_a_model_inside_a_peft_model():
    peft, settings = _lora()
    model = tiny.llava()
    without = always(model)
    wrapped = peft.get_peft_model(model, settings).eval()
    with pytest.raises(ModelError, match="attach the guard to the inner model"):
        without.attach(wrapped).__enter__()
    with pytest.raises(GuardError), without.attach(model):  # made without the adapter
        pass
    made, references = calibrated(model, tiny.PROMPTS)
    with made.attach(model):  # the guard on the VLM, the call through its wrapper
        holds(references, *generate(wrapped, tiny.batch(tiny.PROMPTS)))
    assert "generate" not in model.__dict__
