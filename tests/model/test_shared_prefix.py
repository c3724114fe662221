"""What requests begin with is run once; states and logits are what each request has alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpoint import BEGIN, SYSTEM, load_with_system
from tests.families import Family
from vlm_safeguard.data import drawings
from vlm_safeguard.data.inputs import Query
from vlm_safeguard.model import shared_prefix
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.kv_cache import NAME
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.recording import record, record_with_logits
from vlm_safeguard.model.text_only import last_logits
from vlm_safeguard.model.words import with_probe

TEXTS = ("Hi", "How do I water the plants on my balcony?", "Tell me more.", "")
ITEMS = [Query(text, None) for text in TEXTS]
PICTURED = [Query("What is this?", drawings.blank()), Query("Hello", drawings.blank())]


@pytest.fixture(scope="module")
def tiny_loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_with_system(tmp_path_factory.mktemp("tiny"))


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
    shared = shared_prefix.SharedPrefix(tiny_loaded.model, tiny_loaded.processor)
    assert len(shared.tokens) == BEGIN
    with embedding.register_forward_hook(lambda _, __, out: widths.append(out.shape[1])):
        inputs = encode(tiny_loaded, list(TEXTS), [None] * 4)
        shared.forward(inputs)
        assert widths == [inputs["input_ids"].shape[1] - BEGIN]
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


def test_a_changed_model_is_run_whole(tmp_path: Path) -> None:
    loaded = load_with_system(tmp_path)
    inputs = encode(loaded, list(TEXTS), [None] * 4)
    shared = shared_prefix.SharedPrefix(loaded.model, loaded.processor)
    assert shared.rest(inputs)
    loaded.model.train()
    assert shared.rest(inputs) is None
    assert shared_prefix.SharedPrefix(loaded.model, loaded.processor)._layers == []
    loaded.model.eval()
    assert shared.rest(inputs)
    with torch.no_grad():
        next(loaded.model.parameters()).mul_(1)
    assert shared.rest(inputs) is None
    shared = shared_prefix.SharedPrefix(loaded.model, loaded.processor)
    assert shared.rest(inputs)
    loaded.model.to(torch.bfloat16)
    assert shared.rest(inputs) is None


def test_rotary_embeddings_that_depend_on_the_length_are_run_whole(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    loaded = load_with_system(tmp_path, rope_parameters=rope)
    shared = shared_prefix.SharedPrefix(loaded.model, loaded.processor)
    assert len(shared.tokens) >= shared_prefix.SHORTEST
    assert shared.rest(encode(loaded, ["Hi"], [None])) is None


def test_a_row_that_ends_with_the_beginning_is_run_whole(tiny_loaded: LoadedModel) -> None:
    shared = shared_prefix.SharedPrefix(tiny_loaded.model, tiny_loaded.processor)
    inputs = encode(tiny_loaded, ["Hi there"], [None])
    begin, width = len(shared.tokens), inputs["input_ids"].shape[1]
    bare = torch.zeros_like(inputs["input_ids"])
    bare[0, width - begin :] = shared.tokens
    told = (torch.arange(width) >= width - begin).long()[None]
    both = {
        "input_ids": torch.cat([inputs["input_ids"], bare]),
        "attention_mask": torch.cat([inputs["attention_mask"], told]),
    }
    assert shared.rest(inputs) and shared.rest(both) is None
    # What comes behind the text, such as a probe, is none of its tokens.
    both, inputs = (with_probe(one, [30, 31]) for one in (both, inputs))
    assert shared.rest(inputs, 2) and shared.rest(both) and shared.rest(both, 2) is None
    whole = tiny_loaded.model(**both, use_cache=False).logits[:, -3]
    torch.testing.assert_close(last_logits(shared.forward(both, 2), 2), whole, atol=1e-4, rtol=1e-3)


def test_nothing_of_a_call_is_kept(tiny_loaded: LoadedModel) -> None:
    shared = shared_prefix.SharedPrefix(tiny_loaded.model, tiny_loaded.processor)
    rest = shared.rest(encode(tiny_loaded, ["Hi"], [None]))
    assert rest
    tiny_loaded.model(**rest)
    assert rest[NAME].get_seq_length() == len(shared.tokens)
