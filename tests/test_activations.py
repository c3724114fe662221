"""What is recorded of a model: which layers, and in which batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import checkpoint
from vlm_safeguard import pictures
from vlm_safeguard.activations import record
from vlm_safeguard.models import LoadedModel, batches, find_decoder, load
from vlm_safeguard.requests import Request

ITEMS = [Request(text, None) for text in ("Hi", "How do I water the plants?", "Tell me more.")]
ITEMS += [Request("What is in this picture?", pictures.blank()), Request("Hello", None)]


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


def test_batches_hold_all_once_by_length_in_tokens(loaded: LoadedModel) -> None:
    texts = ["a b c d e f", "hello", "", "one two three", "Hello hello hello hello hello"]
    groups = batches(loaded, texts, 2)
    assert [len(group) for group in groups] == [2, 2, 1]
    order = [index for group in groups for index in group]
    assert sorted(order) == list(range(len(texts)))
    lengths = [len(loaded.processor.tokenizer(texts[index]).input_ids) for index in order]
    assert lengths == sorted(lengths, reverse=True)
    assert batches(loaded, [], 2) == []
