"""A prompt that is longer than the model's positions is refused before any work."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from tests import families, tiny
from tests.model.family_helpers import guard_for
from vlm_safeguard.errors import GuardRuntimeError, PromptTooLong
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.positions import room


def model_with(**config: Any) -> Any:
    text = SimpleNamespace(**config)
    return SimpleNamespace(config=SimpleNamespace(get_text_config=lambda decoder: text))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 100}, 100),
        ({"max_position_embeddings": 100, "sliding_window": 16}, 100),
        ({"max_position_embeddings": 100, "rope_parameters": YARN}, 400),
        ({"max_position_embeddings": 400, "rope_parameters": YARN}, 400),
        (
            {
                "max_position_embeddings": 100,
                "rope_parameters": {"full_attention": YARN, "sliding_attention": {}},
            },
            400,
        ),
        ({"max_position_embeddings": 100, "rope_parameters": {"rope_type": "dynamic"}}, None),
        ({"max_position_embeddings": None}, None),
        ({}, None),
    ],
)
def test_positions_of_a_model(config: dict[str, Any], expected: int | None) -> None:
    assert room(model_with(**config)) == expected


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_a_prompt_longer_than_the_positions_is_refused_before_work(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = families.FAMILIES[name]
    loaded = one.build()
    made, model = guard_for(one, loaded), loaded.model
    text, seen = (encode(loaded, ["Hi there"], [i]) for i in (None, families.photo(1, 96, 96)))
    length, longer = text["input_ids"].shape[1], seen["input_ids"].shape[1]
    # Pictures of Qwen take fewer positions than tokens: all that is known is what the words take.
    needed = length + 2 if name == "qwen2_vl" else longer
    two = encode(loaded, ["Hi there", "Hi"], [None, None])
    config = model.config.get_text_config()
    ran: list[int] = []
    model.get_decoder().layers[0].register_forward_hook(lambda *_: ran.append(1))
    with made.attach(model) as session:
        for inputs, enough in ((text, length), (seen, needed), (two, length)):
            monkeypatch.setattr(config, "max_position_embeddings", enough)
            model.generate(**inputs, max_new_tokens=1)
            assert session.decisions and ran
            monkeypatch.setattr(config, "max_position_embeddings", enough - 1)
            ran.clear()
            reason = f"takes {enough} positions, and the model has {enough - 1}"
            for call in (model.generate, model.forward):
                with pytest.raises(GuardRuntimeError, match=reason):
                    call(**inputs)
            assert not ran
        monkeypatch.setattr(config, "max_position_embeddings", length)
        ids = torch.tensor([tiny.words(0, length + 1)])
        with pytest.raises(GuardRuntimeError, match="the request as text takes"):
            model.generate(**text, text_input_ids=ids)


@pytest.mark.parametrize(
    "asked",
    [
        lambda length, new: {"max_new_tokens": new},
        lambda length, new: {"generation_config": GenerationConfig(max_new_tokens=new)},
        lambda length, new: {"max_length": length + new},
        lambda length, new: {"generation_config": GenerationConfig(max_length=length + new)},
        lambda length, new: {"max_new_tokens": new, "max_length": 10_000},
    ],
)
def test_an_answer_that_would_pass_the_positions_is_refused_before_work(
    asked: Callable[[int, int], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last token of an answer is never put in, so it takes no position."""
    model = tiny.llava()
    inputs = tiny.batch(tiny.TEXTS[:2])
    length = inputs["input_ids"].shape[1]
    ran: list[int] = []
    model.get_decoder().layers[0].register_forward_hook(lambda *_: ran.append(1))
    monkeypatch.setattr(model.config.get_text_config(), "max_position_embeddings", length + 4)
    with tiny.always(model).attach(model):
        output = model.generate(**inputs, **asked(length, 5))
        assert output.shape[1] == length + 5 and ran
        ran.clear()
        reason = f"takes {length} positions of the model's {length + 4}, and 6 new tokens do not"
        with pytest.raises(PromptTooLong, match=f"{reason} fit behind it: ask for at most 5"):
            model.generate(**inputs, **asked(length, 6))
        assert not ran


def test_a_caller_who_asks_for_no_length_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llava()
    inputs = tiny.batch(tiny.TEXTS[:1])
    length = inputs["input_ids"].shape[1]
    monkeypatch.setattr(model.config.get_text_config(), "max_position_embeddings", length + 4)
    with tiny.always(model).attach(model):
        assert model.generate(**inputs).shape[1] == length + 20  # as transformers does by itself
        model.generation_config.max_length = 10_000
        assert model.generate(**inputs, max_new_tokens=2).shape[1] == length + 2
        model.generation_config.max_new_tokens = 6
        with pytest.raises(PromptTooLong, match="6 new tokens"):
            model.generate(**inputs)
