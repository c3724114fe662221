"""The language model in the embedded VLM is the publisher's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from vlm_safeguard.embedded.assemble import MODELS, PROJECTOR, TOWER, default_cache
from vlm_safeguard.embedded.base_llm import load_llm
from vlm_safeguard.model.chat import prepare
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.text_only import find_markup

pytestmark = pytest.mark.embedded
NAME = "embedded"
SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


@pytest.fixture(scope="module")
def published(loaded: LoadedModel) -> tuple[Any, Any]:
    """Language model and tokenizer of the publisher's file."""
    return load_llm(MODELS[NAME].base, default_cache())


def talk(*parts: object) -> list[dict[str, Any]]:
    content = [
        {"type": "image", "image": part}
        if isinstance(part, Image.Image)
        else {"type": "text", "text": part}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


@torch.inference_mode()
def test_its_language_model_is_the_publishers_bit_for_bit(
    loaded: LoadedModel, published: tuple[Any, Any]
) -> None:
    plain = published[0]
    state = plain.state_dict()
    own = dict(loaded.model.model.language_model.state_dict())
    assert {f"model.{name}" for name in own} | {"lm_head.weight"} == set(state)
    assert all(torch.equal(own[name], state[f"model.{name}"]) for name in own)
    assert torch.equal(loaded.model.lm_head.weight, state["lm_head.weight"])
    inputs = prepare(loaded.processor, [talk("How do I bake bread?")])
    here, there = (model(**inputs).logits for model in (loaded.model, plain))
    assert torch.equal(here, there)


def test_its_configuration_names_no_folder(published: tuple[Any, Any]) -> None:
    """Or no two assemblies would give the same files."""
    assert published[0].config.name_or_path == ""


def test_the_template_is_the_publishers_on_text(
    loaded: LoadedModel, published: tuple[Any, Any]
) -> None:
    """Default system prompt, one of the caller's own, several turns."""
    tokenizer = published[1]
    own = {"role": "system", "content": "Be brief."}
    turns = [*_plain("Hi"), {"role": "assistant", "content": "Hello."}, *_plain("Why?")]
    for messages in (_plain("Hi"), [own, *_plain("Hi")], turns):
        options = {"add_generation_prompt": True, "tokenize": False}
        expected = tokenizer.apply_chat_template(messages, **options)
        assert loaded.processor.apply_chat_template(messages, **options) == expected
    assert SYSTEM in expected


def _plain(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_it_is_a_plain_checkpoint_that_takes_pictures(loaded: LoadedModel) -> None:
    assert getattr(loaded.model.config, "quantization_config", None) is None
    assert loaded.model.generation_config.eos_token_id == [151645, 151643]
    markup = find_markup(loaded)
    assert len(markup.token_ids) == 1 and loaded.processor.tokenizer.decode(markup.after) == "\n"
    picture = Image.new("RGB", (224, 224), (127, 127, 127))
    inputs = prepare(loaded.processor, [talk(picture, "What is in this picture?")])
    assert int((inputs["input_ids"] == markup.token_ids[0]).sum()) == 16
    out = loaded.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert loaded.processor.decode(out[0, inputs["input_ids"].shape[1] :]).strip()


def test_what_ships_is_small() -> None:
    weights = {model.resource(name) for model in MODELS.values() for name in (PROJECTOR, TOWER)}
    assert sum(path.stat().st_size for path in weights) <= 15_000_000
