"""Half precision, gradient checkpointing, and weights or states on other devices."""

import pytest
import torch

from tests import tiny
from tests.reference import CLOSE, calibrated, holds
from tests.tiny import NEW, always, generate
from vlm_safeguard.model.residual_stream import find_decoder
from vlm_safeguard.runtime.session import Session
from vlm_safeguard.runtime.steering import Steerer


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(mixed, reentrant):
    model = tiny.llava()
    made, references = calibrated(model, tiny.PROMPTS)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    inputs = tiny.batch(tiny.PROMPTS)
    with made.attach(model):
        logits = model(**inputs).logits
        for row, reference in enumerate(references):
            kept = inputs["attention_mask"][row].bool()
            expected = reference.logits([])
            torch.testing.assert_close(logits[row, kept].detach(), expected, **CLOSE)
        logits.sum().backward()
    model.eval()
    with made.attach(model):
        holds(references, *generate(model, inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_restores_to_its_own_rounding(dtype):
    """At every changed column the coordinates are (1 + alpha) times the anchors' mean."""
    model = tiny.llava().to(dtype)
    made = always(model, reference="anchor", alpha=0.5, tokens=2)
    states = {}
    inputs = tiny.batch(tiny.PROMPTS)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with made.attach(model) as session:
        hooks = [
            find_decoder(model)
            .layers[layer]
            .register_forward_hook(
                lambda _, __, out, n=layer: states.setdefault(n, []).append(out.double())
            )
            for layer in made.config.steering.layers
        ]
        generate(model, inputs)
        for hook in hooks:
            hook.remove()
        assert all(d.fired for d in session.decisions)
    for layer in made.config.steering.layers:
        rows = made.tensors[f"directions.{layer}"].double()
        target = 1.5 * made.tensors[f"anchor.{layer}"].double()
        prompt, second, third, _ = states[layer][-NEW:]  # after the text-only pass
        for state in (prompt[:, -1], second[:, 0]):
            slack = torch.finfo(dtype).eps * state.norm(dim=1).max()
            assert ((state @ rows.T - target).abs() < slack).all()
        assert ((third[:, 0] @ rows.T - target).abs().amax(1) > 0.1).all()


def test_layers_whose_weights_are_elsewhere_between_calls():
    """As accelerate leaves them for a model larger than its device: on `meta` until needed."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny.llava()
    made, references = calibrated(model, tiny.PROMPTS)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=False)
    assert next(find_decoder(model).layers[2].parameters()).device.type == "meta"
    session = Session(made.config, made.tensors, model)
    try:
        tokens, logits = generate(model, tiny.batch(tiny.PROMPTS))
    finally:
        session.detach()
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    holds(references, tokens, logits)


def test_directions_follow_the_states_to_their_device(model):
    """The plan of a dose is made where the layer's states are, not where a parameter lies."""
    made = always(model)
    layer = made.config.steering.layers[0]
    steerer = Steerer(made.config.steering, made.tensors, text_gates=True)
    elsewhere = steerer.directions(layer, torch.device("meta"))
    assert elsewhere.device.type == "meta"
