"""Every family of ``tests.families`` through the same code: decoder, text, steering, markup."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests import families, family_table, tiny
from tests.families import FAMILIES, Family
from tests.reference import close
from tests.tiny import generate
from vlm_safeguard.artifact.config import Markup
from vlm_safeguard.calibration import doctor
from vlm_safeguard.calibration.doctor import describe, examine
from vlm_safeguard.data.inputs import Query
from vlm_safeguard.errors import ModelError
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.fingerprint import template_digest
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.recording import record
from vlm_safeguard.model.residual_stream import (
    find_decoder,
    hidden_of,
    verify_residual_stream,
    watch_layer,
)
from vlm_safeguard.model.text_only import (
    ImageMarkup,
    find_markup,
    image_token,
    text_columns,
    text_only,
)

PROMPTS = ["What is this?", "How many of them are there, would you say?"]
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
    return {layer: taken[layer] for layer in range(last + 1)}


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
    one: Family,
    loaded: LoadedModel,
    thresholds: float | list[float] = ALWAYS,
    source: str = "text",
    **steering: Any,
) -> Guard:
    """A guard gated by one source, and its markup as written down in the matrix."""
    layers = text_layers(one, loaded)
    gates = [tiny.gate(source, *layers, threshold=0.0)]
    made = tiny.guard(loaded.model, gates, layers=[layers[1], layers[-1]], **steering)
    if isinstance(thresholds, float):
        thresholds = [thresholds] * len(layers)
    made = tiny.with_thresholds(made, [thresholds])
    tokens, *wrapper = one.markup
    before, after, inner = (
        loaded.processor.tokenizer.encode(text, add_special_tokens=False)
        for text in (*wrapper, one.inner)
    )
    ids = loaded.processor.tokenizer.convert_tokens_to_ids(tokens)
    markup = Markup(token_ids=ids, before=before, after=after, inner=inner, pad_id=families.PAD)
    return tiny.changed(made, markup=markup)


def half_open(loaded: LoadedModel, made: Guard, inputs: dict[str, Tensor]) -> tuple[Guard, int]:
    """The guard with the thresholds of its gate between two rows; which of them it opens."""
    gate = made.config.gates[0]
    with made.attach(loaded.model) as session:
        generate(loaded.model, inputs, max_new_tokens=1)
        scores = torch.tensor([d.scores[f"{gate.source}.0"] for d in session.decisions])
    middle = torch.tensor(gate.thresholds) + scores.mean(0)
    return tiny.with_thresholds(made, [middle.tolist()]), int(scores.sum(1).argmax())


def batch(one: Family, loaded: LoadedModel) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Two requests as one batch and each alone; the second is text alone where that goes."""
    pictures = [families.photo(1), None if one.mixed else families.photo(2)]
    alone = [encode(loaded, [p], [i]) for p, i in zip(PROMPTS, pictures, strict=True)]
    return encode(loaded, PROMPTS, pictures), alone


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
    made, open_row = half_open(loaded, guard_for(one, loaded, 0.0), inputs)
    with made.attach(loaded.model) as session:
        _, together = generate(loaded.model, inputs)
        fired = [d.fired for d in session.decisions]
        assert fired == [open_row == 0, open_row == 1]
        for row, request in enumerate(alone):
            close(together[row], generate(loaded.model, request)[1][0])
            assert [d.fired for d in session.decisions] == fired[row : row + 1]
    _, plain = generate(loaded.model, inputs)
    assert (together[open_row] - plain[open_row]).abs().max() > 1e-2
    close(together[1 - open_row], plain[1 - open_row])


def test_cached_decoding_equals_recomputing(one: Family, loaded: LoadedModel) -> None:
    inputs = encode(loaded, PROMPTS[:1], [families.photo(1)])
    with guard_for(one, loaded, tokens=2).attach(loaded.model):
        _, cached = generate(loaded.model, inputs)
        _, anew = generate(loaded.model, inputs, use_cache=False)
    close(cached, anew)


# -- processor and template --------------------------------------------------------------------


def test_markup(one: Family, loaded: LoadedModel) -> None:
    if not one.text_alone:
        with pytest.raises(ModelError, match=f"{one.name}Processor refuses"):
            find_markup(loaded)
        return
    markup, decode = find_markup(loaded), loaded.processor.tokenizer.decode
    assert {decode([t]) for t in markup.token_ids} == set(one.markup[0])
    assert (decode(markup.before), decode(markup.after)) == one.markup[1:]
    assert decode(markup.inner) == one.inner


SIZES = [(40, 32), (64, 64), (200, 40), (40, 200), (130, 90), (30, 31)]
MULTILINE = "Say,\n\nwhat is this?\n"


def readings(loaded: LoadedModel, prompts: list[str], size: tuple[int, int]) -> list[list[int]]:
    """Rows of the text-only reading of pictured requests."""
    inputs = encode(loaded, prompts, [families.photo(3, *size)] * len(prompts))
    return readings_of(inputs, find_markup(loaded))


def readings_of(inputs: Mapping[str, Tensor], markup: ImageMarkup) -> list[list[int]]:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    columns = text_columns(ids, mask, markup)
    ids, mask = text_only(ids, columns, families.PAD)
    return [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("name", [n for n, one in FAMILIES.items() if one.text_alone])
def test_the_reading_of_a_pictured_request_is_the_text_alone(name: str) -> None:
    one, loaded = FAMILIES[name], loaded_of(FAMILIES[name])
    prompts, tokenizer = [MULTILINE, PROMPTS[1]], loaded.processor.tokenizer
    text = encode(loaded, prompts, [None, None])
    expected = [
        row[kept.bool()].tolist()
        for row, kept in zip(text["input_ids"], text["attention_mask"], strict=True)
    ]
    if not one.exact:
        said = [tokenizer.decode(row).replace("User: ", "User:", 1) for row in expected]
        expected = [tokenizer.encode(line, add_special_tokens=False) for line in said]
    for size in SIZES:
        assert readings(loaded, prompts, size) == expected
        assert readings(loaded, prompts[:1], size) == expected[:1]


# Turns by role; a size stands for a picture of that size.
Part = str | tuple[int, int]
CONVERSATIONS: dict[str, list[tuple[str, list[Part]]]] = {
    "two pictures": [("user", [(40, 32), (130, 60), "How do they differ?"])],
    "newlines around": [("user", [(40, 32), "\n\nFirst.\n", (130, 60), "\nSecond,\n\nthird.\n"])],
    "newlines alone between": [("user", [(40, 32), "\n\n", (130, 60), "\nWhich?"])],
    "text first": [("user", ["Look:\n\n", (40, 32), "and ", (130, 60)])],
    "a picture, then text": [
        ("user", [(40, 32), "What is this?"]),
        ("assistant", ["A dog.\n"]),
        ("user", ["Are you sure?"]),
    ],
    "a picture in each turn": [
        ("user", [(40, 32), "What is this?"]),
        ("assistant", ["A dog."]),
        ("user", [(130, 60), "And\nthis?\n"]),
    ],
}


def reading_of_conversation(
    loaded: LoadedModel, markup: ImageMarkup, turns: list[tuple[str, list[Part]]]
) -> tuple[str, str]:
    """The text-only reading of a conversation, and what the template makes of its text alone."""

    def rendered(pictured: bool) -> str:
        messages = [
            {
                "role": role,
                "content": [
                    {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                    for part in parts
                    if pictured or isinstance(part, str)
                ],
            }
            for role, parts in turns
        ]
        return str(
            loaded.processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        )

    sizes = [part for _, parts in turns for part in parts if not isinstance(part, str)]
    inputs = loaded.processor(
        text=[rendered(True)],
        images=[[families.photo(seed, *size) for seed, size in enumerate(sizes)]],
        return_tensors="pt",
        add_special_tokens=False,
    )
    (reading,) = readings_of(inputs, markup)
    assert not set(reading) & {*markup.token_ids, image_token(loaded)}
    return loaded.processor.tokenizer.decode(reading), rendered(False)


@pytest.mark.parametrize("name", [n for n, one in FAMILIES.items() if one.text_alone])
def test_the_reading_of_several_pictures_and_turns_is_the_text_alone(name: str) -> None:
    """To the letter, but where the template writes white space before text and none before a
    picture. Every template takes several pictures; of PaliGemma there is no reading at all."""
    loaded = loaded_of(FAMILIES[name])
    markup = find_markup(loaded)
    exact = loaded.processor.chat_template != families.IDEFICS_TEMPLATE
    for what, turns in CONVERSATIONS.items():
        said, expected = reading_of_conversation(loaded, markup, turns)
        if exact:
            assert said == expected, what
        assert letters(said) == letters(expected), what


def letters(text: str) -> str:
    return "".join(text.split())


def test_rows_of_tiles_and_what_stands_between_them() -> None:
    loaded = families.tiled()
    tokenizer, markup = loaded.processor.tokenizer, find_markup(loaded)
    tags = {f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)}
    tokens = {tokenizer.decode([token]) for token in markup.token_ids}
    assert tokens == tags | {"<image>", "<fake_token_around_image>", "<global-img>"}
    assert [tokenizer.decode([token]) for token in markup.inner] == ["\n"]
    assert markup.before == markup.after == ()
    seen = set()
    for size in SIZES:
        (reading,) = readings(loaded, [MULTILINE], size)
        assert tokenizer.decode(reading) == f"<s>User:{MULTILINE}<end_of_utterance>\nAssistant:"
        ids = encode(loaded, [MULTILINE], [families.photo(3, *size)])["input_ids"]
        seen |= set(ids[0].tolist()) & set(tokenizer.convert_tokens_to_ids(sorted(tags)))
    assert len(seen) > 3


def test_a_template_that_says_more_without_a_picture() -> None:
    """As Llama 3.2's, which has a system message where there is no picture."""
    loaded = families.llava()
    pictured = "{% if messages[0]['content'][0]['type'] == 'image' %}"
    loaded.processor.chat_template = (
        pictured + "{% else %}system: Today is Monday.\n{% endif %}"
    ) + loaded.processor.chat_template
    expected = "user: How?\nassistant: "
    decode = loaded.processor.tokenizer.decode
    assert decode(encode(loaded, ["How?"], [None])["input_ids"][0]) == expected
    assert decode(readings(loaded, ["How?"], (40, 32))[0]) == expected


def test_newlines_of_a_wrapper_that_melt_with_those_of_the_text() -> None:
    loaded = families.gemma3(newlines=True)
    (reading,) = readings(loaded, [MULTILINE], (40, 32))
    said = loaded.processor.tokenizer.decode(reading)
    assert said.split("Say,")[1] == ("Say," + MULTILINE[4:] + "\nassistant\n").split("Say,")[1]
    assert said.split("Say,")[0].rstrip() == "user" and said.split("Say,")[0].endswith("\n")


def test_wrappers_melt_with_the_newlines_of_the_text_and_of_each_other() -> None:
    """Gemma's newlines around a picture become one token with those of the user's text, or of the
    next picture; the tokens that begin and end a picture go all the same."""
    loaded = families.gemma3(newlines=True)
    markup = find_markup(loaded)
    for what, turns in CONVERSATIONS.items():
        said, expected = reading_of_conversation(loaded, markup, turns)
        assert letters(said) == letters(expected), what
        texts = [part for _, parts in turns for part in parts if isinstance(part, str)]
        assert all(text.strip() in said for text in texts), what


def test_a_template_with_other_words_around_a_picture_is_refused() -> None:
    loaded = families.llava()
    loaded.processor.chat_template = (
        "{% if messages[0]['content'][0]['type'] == 'image' %}Look: {% endif %}"
    ) + loaded.processor.chat_template.replace("assistant", "{{ messages[0]['content'] | length }}")
    with pytest.raises(ModelError, match="tiny LLaVA: its chat template words"):
        find_markup(loaded)


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
    "Florence-2": "encoder-decoder",
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
    with pytest.raises(ModelError, match="only words: its configuration names no image token"):
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


# -- what doctor and the docs say --------------------------------------------------------------


def test_description_and_checks(one: Family, loaded: LoadedModel) -> None:
    if not one.text_alone:
        with pytest.raises(ModelError):
            describe(loaded)
        return
    found = describe(loaded)
    assert (found.model, found.family) == (loaded.name, type(loaded.model).__name__)
    assert (found.decoder, found.layers, found.hidden_size) == (one.decoder, 4, 32)
    assert set(found.image_tokens) == set(one.markup[0])
    assert (found.before, found.after) == one.markup[1:]
    assert (found.dtypes, found.devices) == (("float32",), ("cpu",))
    assert found.template == hashlib.sha256(loaded.processor.chat_template.encode()).hexdigest()
    said = {check.name: check.found for check in examine(found)}
    assert f"{one.decoder}: 4 layers of 32" in said["decoder"]
    assert repr(found.image_tokens[0]) in said["image tokens"]


def test_a_guard_for_another_template_is_diagnosed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    one, loaded = FAMILIES["llava"], families.llava()
    made = guard_for(one, loaded)
    identity = {"template_sha256": template_digest(loaded.processor)}
    config = made.config.model_copy(update={"model": made.config.model.model_copy(update=identity)})
    made = Guard(config, made.tensors)
    for name in ("_directions", "_effect"):
        monkeypatch.setattr(doctor, name, lambda *_: [])
    assert all(check.ok for check in doctor.diagnose(loaded, made))
    loaded.processor.chat_template += " "
    failed = [check for check in doctor.diagnose(loaded, made) if not check.ok]
    assert [check.name for check in failed] == ["belongs to this model"]
    assert "chat template differs" in failed[0].found


def test_the_committed_tables_are_current() -> None:
    for path, text in family_table.documents().items():
        assert path.read_text(encoding="utf-8") == text, "python -m tests.family_table"
