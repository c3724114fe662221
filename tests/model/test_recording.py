"""What is recorded of a model: which layers, and in which batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import checkpoint, tiny
from tests.reference import close
from vlm_safeguard.data import drawings
from vlm_safeguard.data.inputs import Query, batches
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.loading import LoadedModel, load
from vlm_safeguard.model.recording import record, record_with_logits
from vlm_safeguard.model.residual_stream import find_decoder
from vlm_safeguard.model.text_only import find_markup

ITEMS = [Query(text, None) for text in ("Hi", "How do I water the plants?", "Tell me more.")]
ITEMS += [Query("What is in this picture?", drawings.blank()), Query("Hello", None)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(checkpoint.save(tmp_path_factory.mktemp("tiny")))


@pytest.mark.parametrize("count", [1, 2])
def test_the_first_layers_alone_are_what_they_are_among_all(
    loaded: LoadedModel, tmp_path: Path, count: int
) -> None:
    whole = record(loaded, ITEMS, tmp_path, batch=2)
    above: list[int] = []
    layers = find_decoder(loaded.model).layers
    with layers[count].register_forward_hook(lambda *_: above.append(1)):
        part = record(
            loaded, ITEMS, tmp_path, batch=2, layers=count, decoder=find_decoder(loaded.model)
        )
    assert part.shape == (len(ITEMS), count, whole.shape[2]) and not above
    assert torch.equal(part, whole[:, :count])


def test_the_head_runs_where_logits_are_read_and_on_states_in_one_piece(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    """On a CPU torch multiplies the last columns of a batch far slower where they lie."""
    seen: list[bool] = []
    head = loaded.model.get_output_embeddings()

    def see(_: Any, args: tuple[torch.Tensor], __: Any) -> None:
        if len(args[0]) > 1:  # not of the pass that verifies the model
            seen.append(args[0].is_contiguous())

    with head.register_forward_hook(see):
        states = record(loaded, ITEMS, tmp_path)
        assert not seen
        again, found = record_with_logits(loaded, ITEMS, tmp_path, lambda logits: logits)
    assert seen and all(seen)
    assert torch.equal(states, again)
    with torch.no_grad():
        alone = loaded.model(**encode(loaded, [ITEMS[1].text], [None])).logits[0, -1]
    close(found[1].double(), alone.double())
    assert not head._forward_pre_hooks


def test_batches_hold_all_once_by_length_in_tokens_and_pictures_apart(loaded: LoadedModel) -> None:
    # The tokenizer reads bytes: two for an accented letter, so the shorter of two is the longer.
    texts = ["seven!!", "\u00e9" * 5, "", "one two three", "half of a pair: \ud800"]
    items = [Query(text, None) for text in texts]
    items += [Query("Hi", drawings.blank()), Query("Hello", drawings.blank())]
    groups = batches(loaded.processor.tokenizer, items, 2)
    assert groups == [[6, 5], [4, 3], [1, 0], [2]]
    assert batches(loaded.processor.tokenizer, [], 2) == []


def test_the_requests_own_pass_is_recorded_under_guard_and_in_generate(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    """Not the guard's text-only pass before it, nor the decoding steps after it."""
    model, decoder = loaded.model, find_decoder(loaded.model)
    wanted = record(loaded, ITEMS, tmp_path).clone()
    shut = tiny.guard(
        model, [tiny.gate("text", len(decoder.layers) - 1, threshold=1e9)], layers=[1]
    )
    # What is read of a picture differs between this checkpoint and the bare tiny model.
    shut = tiny.changed(shut, markup=find_markup(loaded))
    with shut.attach(model):
        guarded = record(loaded, ITEMS, tmp_path, decoder=decoder).clone()
    torch.testing.assert_close(guarded, wanted, atol=1e-3, rtol=1e-3)

    def respond(group: list[int], inputs: dict[str, torch.Tensor]) -> None:
        model.generate(**inputs, max_new_tokens=3, do_sample=False)

    generated = record(loaded, ITEMS, tmp_path, run=respond)
    torch.testing.assert_close(generated, wanted, atol=1e-3, rtol=1e-3)
