"""The decoder of every family of ``tests.families``: found, verified, or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests import families, tiny
from tests.families import FAMILIES, Family
from tests.model.family_helpers import (
    PROMPTS,
    bare_states,
    decoder_of,
    guard_for,
    states_in,
    text_layers,
)
from tests.reference import close
from tests.tiny import generate
from vlm_safeguard.data.inputs import Query
from vlm_safeguard.errors import ModelError
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.recording import record
from vlm_safeguard.model.residual_stream import (
    find_decoder,
    hidden_of,
    verify_residual_stream,
    watch_layer,
)
from vlm_safeguard.model.text_only import (
    find_markup,
)

# -- the decoder -------------------------------------------------------------------------------


def test_decoder(one: Family, loaded: LoadedModel) -> None:
    decoder = verify_residual_stream(loaded.model)
    assert replace(decoder, whole=True) == find_decoder(loaded.model)
    assert decoder.path == one.decoder
    assert decoder.module is decoder_of(one, loaded)
    assert len(decoder.layers) == families.LAYERS and decoder.hidden_size == families.WIDTH
    assert sorted(decoder.skipped | set(text_layers(one, loaded))) == list(range(families.LAYERS))
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in decoder.layers)


def test_the_picture_matters(one: Family, loaded: LoadedModel) -> None:
    """Without this the rest would say little."""
    logits = [
        loaded.model(**encode(loaded, PROMPTS[:1], [families.photo(seed)])).logits[0, -1]
        for seed in (1, 2)
    ]
    assert (logits[0] - logits[1]).abs().max() > 1e-2


# -- layers that a request without a picture skips ---------------------------------------------


def test_the_stream_past_a_skipped_layer_is_read_and_replaced() -> None:
    loaded = families.mllama()
    decoder = find_decoder(loaded.model)
    assert decoder.skipped == {1}
    text, pictured = (encode(loaded, PROMPTS[:1], [i]) for i in (None, families.photo(1)))
    for inputs in (text, pictured):
        seen: dict[int, Tensor] = {}

        def see(layer: int, seen: dict[int, Tensor] = seen) -> Any:
            return lambda output: seen.__setitem__(layer, hidden_of(output).clone())

        def move(output: Any) -> Tensor:
            return hidden_of(output) + 1

        handles = [watch_layer(decoder, layer, see(layer)) for layer in range(families.LAYERS)]
        plain = states_in(decoder.module, lambda inputs=inputs: loaded.model(**inputs))
        for layer, state in plain.items():
            assert torch.equal(seen[layer], state)
        assert torch.equal(plain[0], plain[1]) == (inputs is text)
        handles.append(watch_layer(decoder, 1, move))
        moved = states_in(decoder.module, lambda inputs=inputs: loaded.model(**inputs))
        assert torch.equal(moved[1], plain[1] + 1)
        assert not torch.equal(moved[2], plain[2])
        for handle in handles:
            handle.remove()
        again = states_in(decoder.module, lambda inputs=inputs: loaded.model(**inputs))
        assert torch.equal(again[3], plain[3])


def test_recorded_states_of_a_skipped_layer_are_those_below(tmp_path: Path) -> None:
    loaded = families.mllama()
    items = [Query(prompt, None) for prompt in PROMPTS]
    states = record(loaded, items, tmp_path)
    assert torch.equal(states[:, 0], states[:, 1])
    for count in (1, 2, 3):  # the pass ends at, before and after the skipped layer
        assert torch.equal(record(loaded, items, tmp_path, layers=count), states[:, :count])
    for row, prompt in enumerate(PROMPTS):
        expected = bare_states(FAMILIES["mllama"], loaded, prompt)
        close(states[row], torch.stack([expected[layer] for layer in range(families.LAYERS)]))
    pictured = record(loaded, [Query(PROMPTS[0], families.photo(1))], tmp_path)
    assert (pictured[0, 0] - pictured[0, 1]).abs().max() > 1e-2


def test_a_guard_reads_and_steers_where_a_layer_is_skipped() -> None:
    loaded = families.mllama()
    one = FAMILIES["mllama"]
    made = guard_for(one, loaded)
    gate = tiny.gate("text", 0, 1, per_layer=True)
    steered = tiny.guard(loaded.model, [gate], layers=[1, 3])
    steered = Guard(
        steered.config.model_copy(update={"markup": made.config.markup}), steered.tensors
    )
    text, pictured = (encode(loaded, PROMPTS[:1], [i]) for i in (None, families.photo(1)))
    state = bare_states(one, loaded, PROMPTS[0])
    expected = [float(state[n] @ steered.tensors["gate.0"][n]) for n in (0, 1)]
    for inputs in (text, pictured):
        plain, logits = generate(loaded.model, inputs)
        open_guard = tiny.with_thresholds(steered, [[-50.0, -50.0]])
        with open_guard.attach(loaded.model) as session:
            _, moved = generate(loaded.model, inputs)
            scores = session.decisions[0].scores["text.0"]
            rows = session.attestation.rows
        assert scores == pytest.approx([e + 50.0 for e in expected], abs=1e-3)
        assert not torch.equal(moved, logits) and len(rows) == 1
        shut = tiny.with_thresholds(steered, [[50.0, 50.0]])
        with shut.attach(loaded.model):
            same, untouched = generate(loaded.model, inputs)
        assert torch.equal(untouched, logits) and torch.equal(same, plain)


# -- what cannot be guarded --------------------------------------------------------------------


REASONS = {
    "InstructBLIP with a decoder-only LLM": "its own generate\\(\\)",
    "InstructBLIP with T5": "encoder-decoder",
    "BLIP-2": "its own generate\\(\\)",
    "Kosmos-2": "its own generate\\(\\)",
    "Janus": "its own generate\\(\\)",
    "Florence-2": "encoder-decoder",
    "GIT": "0 modules hold the token embedding",
    "Idefics": "does not run on text alone \\(Exactly 1 of pixel_values",
    "Gemma 3n": "not a floating-point residual stream",
}


@pytest.mark.parametrize("name", families.REFUSED)
def test_refused_by_name(name: str) -> None:
    model = families.REFUSED[name]().eval()
    with pytest.raises(ModelError, match=f"{type(model).__name__}.*{REASONS[name]}"):
        verify_residual_stream(model)


def test_a_text_only_model_has_no_image_token() -> None:
    text = LlamaForCausalLM(LlamaConfig(**families.TEXT))
    processor = families.llava().processor
    with pytest.raises(
        ModelError, match="only words: its configuration names no image token, so it takes no"
    ):
        find_markup(LoadedModel(text, processor, "only words"))


def _integers(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda _, __, output: (output * 8).to(torch.int8))


def _none(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda *_: (None,))


def _other_width(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda _, __, output: output[..., : families.WIDTH // 2])


@pytest.mark.parametrize("spoil", [_integers, _none, _other_width])
def test_layers_without_a_residual_stream_are_refused(spoil: Any) -> None:
    model = families.llava().model
    spoil(find_decoder(model).layers[-1])
    with pytest.raises(ModelError, match=r"LlavaForConditionalGeneration.*residual stream"):
        verify_residual_stream(model)


def test_layers_that_do_not_hand_on_what_they_put_out_are_refused() -> None:
    model = families.llava().model
    layer = find_decoder(model).layers[2]
    layer.register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
    with pytest.raises(ModelError, match="what layer 1 puts out is not what layer 2 takes in"):
        verify_residual_stream(model)


def test_layers_that_do_not_run_are_refused() -> None:
    model = families.llava().model
    decoder = find_decoder(model).module
    forward = decoder.forward

    def early(*args: Any, **kwargs: Any) -> Any:
        layers, decoder.layers = decoder.layers, decoder.layers[:2]
        try:
            return forward(*args, **kwargs)
        finally:
            decoder.layers = layers

    decoder.forward = early
    with pytest.raises(ModelError, match=r"of layers \[0, 1, 2, 3\] a text-only pass ran \[0, 1\]"):
        verify_residual_stream(model)


@pytest.mark.parametrize("fault", ["shorter", "elsewhere", "twice", "itself"])
def test_a_decoder_that_cannot_be_verified_is_refused(fault: str) -> None:
    model = families.llava().model
    if fault == "shorter":
        model.model.language_model.layers = model.model.language_model.layers[:3]
    elif fault == "elsewhere":
        model.get_decoder = lambda: model.model.vision_tower
    elif fault == "twice":
        model.model.language_model.more = nn.ModuleList(nn.Identity() for _ in range(4))
    elif fault == "itself":  # what get_decoder() falls back to where it finds no name it knows
        model.get_decoder = lambda: model
        assert find_decoder(model).path == "model.language_model"
        return
    with pytest.raises(ModelError, match="cannot verify the decoder of LlavaForCond"):
        find_decoder(model)
