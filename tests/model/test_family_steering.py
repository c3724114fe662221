"""The text-only pass and steering in every family of ``tests.families``."""

from __future__ import annotations

import pytest
import torch

from tests import families
from tests.families import Family
from tests.model.family_helpers import (
    NEVER,
    PROMPTS,
    bare_states,
    batch,
    decoder_of,
    guard_for,
    half_open,
    states_in,
    text_layers,
)
from tests.reference import close
from tests.tiny import generate
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.loading import LoadedModel

# -- the text-only pass ------------------------------------------------------------------------


def test_the_witness_is_the_bare_language_model(one: Family, loaded: LoadedModel) -> None:
    inputs, _ = batch(one, loaded)
    made = guard_for(one, loaded, 0.0)
    layers = text_layers(one, loaded)
    with made.attach(loaded.model) as session:
        generate(loaded.model, inputs, max_new_tokens=1)
        scores = torch.tensor([d.parts["text.0"] for d in session.decisions])
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
