"""What requests begin with is run once; states and logits are what each request has alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import checkpoint
from tests.families import Family
from vlm_safeguard.data import drawings
from vlm_safeguard.data.inputs import Query
from vlm_safeguard.model import shared_prefix
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.loading import LoadedModel, load
from vlm_safeguard.model.recording import record, record_with_logits

SYSTEM = "You are a helpful assistant. "
TEXTS = ("Hi", "How do I water the plants on my balcony?", "Tell me more.", "")
ITEMS = [Query(text, None) for text in TEXTS]
PICTURED = [Query("What is this?", drawings.blank()), Query("Hello", drawings.blank())]


@pytest.fixture(scope="module")
def tiny_loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    loaded = load(checkpoint.save(tmp_path_factory.mktemp("tiny")))
    loaded.processor.chat_template = SYSTEM + loaded.processor.chat_template
    return loaded


def alone(
    loaded: LoadedModel, items: list[Query], folder: Path, patch: pytest.MonkeyPatch
) -> torch.Tensor:
    """States of each request in a batch of its own, run whole."""
    with patch.context() as whole:
        whole.setattr(shared_prefix, "SHORTEST", 10**9)
        return record(loaded, items, folder, batch=1).clone()


def test_every_family_records_what_each_request_has_alone(
    one: Family, loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = f"{SYSTEM}{loaded.processor.chat_template}"
    monkeypatch.setattr(loaded.processor, "chat_template", begun)
    items = ITEMS if one.text_alone else PICTURED
    wanted = alone(loaded, items, tmp_path, monkeypatch)
    found = record(loaded, items, tmp_path, batch=4)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)


def test_with_pictures_and_logits(
    tiny_loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [*ITEMS, *PICTURED]
    wanted = alone(tiny_loaded, items, tmp_path, monkeypatch)
    torch.testing.assert_close(record(tiny_loaded, items, tmp_path), wanted, atol=1e-4, rtol=1e-3)
    states, best = record_with_logits(tiny_loaded, items, tmp_path, lambda logits: logits.argmax(1))
    torch.testing.assert_close(states, wanted, atol=1e-4, rtol=1e-3)
    for item, token in zip(items, best, strict=True):
        inputs = encode(tiny_loaded, [item.text], [item.image])
        assert tiny_loaded.model(**inputs).logits[0, -1].argmax() == token


def test_the_beginning_is_run_once(tiny_loaded: LoadedModel, tmp_path: Path) -> None:
    widths: list[int] = []
    embedding = tiny_loaded.model.get_input_embeddings()
    begin = len(SYSTEM + "user: ")  # the tokenizer reads bytes
    shared = shared_prefix.SharedPrefix(tiny_loaded.model, tiny_loaded.processor)
    assert len(shared.tokens) == begin
    with embedding.register_forward_hook(lambda _, __, out: widths.append(out.shape[1])):
        inputs = encode(tiny_loaded, list(TEXTS), [None] * 4)
        shared.forward(inputs)
        assert widths == [inputs["input_ids"].shape[1] - begin]
        # A batch that begins otherwise is run whole.
        inputs = {key: value[:, 3:] for key, value in encode(tiny_loaded, ["Hi"], [None]).items()}
        shared.forward(inputs)
    assert widths[1] == inputs["input_ids"].shape[1]


def test_layers_with_a_window_are_run_whole(loaded: LoadedModel) -> None:
    """Keys and values that a window drops cannot be shared."""
    shared = shared_prefix.SharedPrefix(loaded.model, loaded.processor)
    config = loaded.model.config.get_text_config(decoder=True)
    if any("full" not in kind for kind in getattr(config, "layer_types", None) or ()):
        assert not shared._layers
