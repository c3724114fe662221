"""Every family of ``tests.families`` through the same code: decoder, text, steering, markup."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import families, tiny
from tests.families import FAMILIES, Family
from vlm_safeguard.errors import ModelError
from vlm_safeguard.guard import Guard
from vlm_safeguard.models import LoadedModel, encode, find_decoder
from vlm_safeguard.settings import Markup
from vlm_safeguard.witness import find_markup, text_columns, text_only, verify_residual_stream

PROMPTS = ["What is this?", "How many of them are there, would you say?"]
NEW = 4
CLOSE = {"atol": 2e-4, "rtol": 1e-3}
ALWAYS, NEVER = -1e9, 1e9


@pytest.fixture(params=FAMILIES)
def one(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@lru_cache(maxsize=1)  # the tests run family by family
def loaded_of(one: Family) -> LoadedModel:
    return one.build()


@pytest.fixture
def loaded(one: Family) -> LoadedModel:
    return loaded_of(one)


def decoder_of(one: Family, loaded: LoadedModel) -> Any:
    return loaded.model.get_submodule(one.decoder)


def text_layers(one: Family, loaded: LoadedModel) -> list[int]:
    """Layers that run without a picture too."""
    config = loaded.model.config.get_text_config(decoder=True)
    skipped = getattr(config, "cross_attention_layers", None) or []
    return [layer for layer in range(families.LAYERS) if layer not in skipped]


def states_in(module: Any, run: Any) -> dict[int, Tensor]:
    """The residual stream (B, T, d) after every layer that ran: what the next one took in."""
    taken: dict[int, Tensor] = {}
    last = len(module.layers) - 1

    def take(layer: int) -> Any:
        def hook(_: Any, args: tuple, kwargs: dict) -> None:
            taken[layer - 1] = (args[0] if args else kwargs["hidden_states"]).clone()

        return hook

    def leave(_: Any, __: Any, output: Any) -> None:
        taken[last] = (output[0] if isinstance(output, tuple) else output).clone()

    handles = [
        layer.register_forward_pre_hook(take(n), with_kwargs=True)
        for n, layer in enumerate(module.layers)
    ]
    handles.append(module.layers[last].register_forward_hook(leave))
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    for layer in range(last - 1, -1, -1):  # past a layer that did not run the stream goes as it is
        taken.setdefault(layer, taken[layer + 1])
    return taken


def bare_states(
    one: Family, loaded: LoadedModel, prompt: str, pictured: bool = True
) -> dict[int, Tensor]:
    """Last states (d) of the language model by itself on the template's text: one row, no
    padding, no mask, no positions. Where the template writes no white space beside a picture,
    the text of a ``pictured`` request has none there."""
    if not one.text_alone:  # what its processor writes without the picture's own tokens
        ids = encode(loaded, [prompt], [families.photo(1)])["input_ids"][0].tolist()
        image = loaded.model.config.image_token_id
        return last_states(one, loaded, [token for token in ids if token != image])
    text = loaded.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": prompt}]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    if pictured and not one.exact:
        text = text.replace("User: ", "User:", 1)
    tokenizer = loaded.processor.tokenizer
    return last_states(one, loaded, tokenizer(text, add_special_tokens=False)["input_ids"])


def last_states(one: Family, loaded: LoadedModel, ids: list[int]) -> dict[int, Tensor]:
    options = {}
    if one.both_ways:
        options["attention_mask"] = torch.zeros(1, 1, len(ids), len(ids))
    module, row = decoder_of(one, loaded), torch.tensor([ids])
    states = states_in(module, lambda: module(input_ids=row, use_cache=False, **options))
    return {layer: state[0, -1] for layer, state in states.items()}


def guard_for(
    one: Family, loaded: LoadedModel, thresholds: float | list[float] = ALWAYS, **steering: Any
) -> Guard:
    """A guard gated by the text, and its markup as written down in the matrix."""
    layers = text_layers(one, loaded)
    gates = [tiny.gate("text", *layers, threshold=0.0)]
    made = tiny.guard(loaded.model, gates, layers=[layers[1], layers[-1]], **steering)
    if isinstance(thresholds, float):
        thresholds = [thresholds] * len(layers)
    made = tiny.with_thresholds(made, [thresholds])
    tokens, *wrapper = one.markup
    before, after = (
        loaded.processor.tokenizer.encode(text, add_special_tokens=False) for text in wrapper
    )
    ids = loaded.processor.tokenizer.convert_tokens_to_ids(tokens)
    markup = Markup(token_ids=ids, before=before, after=after, pad_id=families.PAD)
    return Guard(made.config.model_copy(update={"markup": markup}), made.tensors)


def batch(one: Family, loaded: LoadedModel) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Two requests as one batch and each alone; the second is text alone where that goes."""
    pictures = [families.photo(1), None if one.mixed else families.photo(2)]
    alone = [encode(loaded, [p], [i]) for p, i in zip(PROMPTS, pictures, strict=True)]
    return encode(loaded, PROMPTS, pictures), alone


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    options = {"max_new_tokens": NEW, "do_sample": False} | options
    out = model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **options)
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, **CLOSE)


# -- the decoder -------------------------------------------------------------------------------


def test_decoder(one: Family, loaded: LoadedModel) -> None:
    decoder = verify_residual_stream(loaded.model)
    assert decoder == find_decoder(loaded.model)
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


# -- the text-only pass ------------------------------------------------------------------------


def test_the_witness_is_the_bare_language_model(one: Family, loaded: LoadedModel) -> None:
    inputs, _ = batch(one, loaded)
    made = guard_for(one, loaded, 0.0)
    layers = text_layers(one, loaded)
    with made.attach(loaded.model) as session:
        generate(loaded.model, inputs, max_new_tokens=1)
        scores = torch.tensor([d.scores["text.0"] for d in session.decisions])
    expected = torch.zeros(len(PROMPTS), len(layers), dtype=torch.float64)
    for row, prompt in enumerate(PROMPTS):
        states = bare_states(one, loaded, prompt, pictured=row == 0 or not one.mixed)
        for place, layer in enumerate(layers):
            vector = made.tensors["gate.0"][place].double()
            expected[row, place] = states[layer].double() @ vector
    close(scores.double(), expected)


# -- steering ----------------------------------------------------------------------------------


def test_a_closed_gate_changes_nothing(one: Family, loaded: LoadedModel) -> None:
    inputs, _ = batch(one, loaded)
    tokens, logits = generate(loaded.model, inputs)
    with guard_for(one, loaded, NEVER).attach(loaded.model) as session:
        guarded = generate(loaded.model, inputs)
        assert not any(d.fired for d in session.decisions)
    assert torch.equal(guarded[0], tokens) and torch.equal(guarded[1], logits)


@pytest.mark.parametrize(("mode", "query"), [("restore", "text"), ("add", "text"), ("add", "pass")])
def test_an_open_gate_moves_states_by_the_formula(
    one: Family, loaded: LoadedModel, mode: str, query: str
) -> None:
    alpha = 0.5
    made = guard_for(one, loaded, mode=mode, query=query, alpha=alpha, tokens=1)
    inputs = encode(loaded, PROMPTS[:1], [families.photo(1)])
    module, layer = decoder_of(one, loaded), made.config.steering.layers[0]
    plain = states_in(module, lambda: loaded.model(**inputs))[layer][0].double()
    with made.attach(loaded.model):
        moved = states_in(module, lambda: loaded.model(**inputs))[layer][0].double()
    rows = made.tensors[f"directions.{layer}"].double()
    state = plain[-1]
    text = bare_states(one, loaded, PROMPTS[0])[layer].double()
    if mode == "add":
        expected = state + alpha * rows.T @ (rows @ (text if query == "text" else state))
    else:
        expected = state - rows.T @ (rows @ state) + (1 + alpha) * rows.T @ (rows @ text)
    assert (expected - state).norm() > 0.1
    close(moved[-1], expected)
    assert torch.equal(moved[:-1], plain[:-1])


def test_rows_of_a_batch_get_what_they_get_alone(one: Family, loaded: LoadedModel) -> None:
    """With the gate open for the one of them alone."""
    inputs, alone = batch(one, loaded)
    made = guard_for(one, loaded, 0.0)
    with made.attach(loaded.model) as session:
        generate(loaded.model, inputs, max_new_tokens=1)
        scores = torch.tensor([d.scores["text.0"] for d in session.decisions])
    made = guard_for(one, loaded, scores.mean(0).tolist())
    with made.attach(loaded.model) as session:
        _, together = generate(loaded.model, inputs)
        fired = [d.fired for d in session.decisions]
        assert sorted(fired) == [False, True]
        for row, request in enumerate(alone):
            close(together[row], generate(loaded.model, request)[1][0])
            assert [d.fired for d in session.decisions] == fired[row : row + 1]
    _, plain = generate(loaded.model, inputs)
    open_row = fired.index(True)
    assert (together[open_row] - plain[open_row]).abs().max() > 1e-2
    assert torch.equal(together[1 - open_row], plain[1 - open_row])


def test_cached_decoding_equals_recomputing(one: Family, loaded: LoadedModel) -> None:
    inputs = encode(loaded, PROMPTS[:1], [families.photo(1)])
    with guard_for(one, loaded, tokens=2).attach(loaded.model):
        _, cached = generate(loaded.model, inputs)
        _, anew = generate(loaded.model, inputs, use_cache=False)
    close(cached, anew)


# -- processor and template --------------------------------------------------------------------


def test_markup(one: Family, loaded: LoadedModel) -> None:
    if not one.text_alone:
        with pytest.raises(ModelError, match=f"{one.name}: its processor refuses"):
            find_markup(loaded)
        return
    markup = find_markup(loaded)
    decode = loaded.processor.tokenizer.decode
    assert {decode([t]) for t in markup.token_ids} == set(one.markup[0])
    assert (decode(markup.before), decode(markup.after)) == one.markup[1:]


SIZES = [(40, 32), (64, 64), (200, 40), (40, 200), (130, 90), (30, 31)]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_the_reading_of_a_pictured_request_is_the_text_alone(
    one: Family, loaded: LoadedModel, size: tuple[int, int]
) -> None:
    if not one.text_alone:
        pytest.skip("its processor takes no text alone")
    markup, tokenizer = find_markup(loaded), loaded.processor.tokenizer
    prompt = "Say,\n\nwhat is this?\n"
    for prompts in ([prompt], [prompt, PROMPTS[1]]):
        inputs = encode(loaded, prompts, [families.photo(3, *size)] * len(prompts))
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        reading = text_only(ids, text_columns(ids, mask, markup), families.PAD)
        text = encode(loaded, prompts, [None] * len(prompts))
        if one.exact:
            assert torch.equal(reading[0], text["input_ids"])
            assert torch.equal(reading[1], text["attention_mask"])
        for row in range(len(prompts)):
            said = [
                tokenizer.decode(ids[row][mask[row].bool()])
                for ids, mask in (reading, (text["input_ids"], text["attention_mask"]))
            ]
            assert said[0].split(":", 1)[1].lstrip() == said[1].split(":", 1)[1].lstrip()
