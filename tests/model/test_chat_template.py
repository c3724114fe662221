"""Chat templates: where they are kept, what content they take, and what is said when they fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import families
from vlm_safeguard.errors import ModelError
from vlm_safeguard.model.chat import encode, render, render_conversation
from vlm_safeguard.model.chat_template import find_template
from vlm_safeguard.model.control_tokens import ControlTokens
from vlm_safeguard.model.fingerprint import template_digest
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.text_only import find_markup

ADDED = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
TRIMMED = ADDED.replace("message['content'] +", "(message['content'] | trim) +")
TESTED = ADDED.replace(
    "message['content'] +", "(message['content'] if message['content'] is string else '') +"
)
ON_TWO_LINES = ADDED.replace("\\n", "\n")
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "What?"},
]


@pytest.fixture
def loaded() -> LoadedModel:
    return families.llava()


def test_a_template_is_found_with_the_tokenizer_and_by_its_name(loaded: LoadedModel) -> None:
    processor = loaded.processor
    own, expected = processor.chat_template, encode(loaded, ["Hi"], [families.photo(1)])
    digest, control = template_digest(processor), ControlTokens.of(processor)
    for on_processor, on_tokenizer in (
        (None, own),
        ({"default": own, "tools": "{{ 1 }}"}, None),
        (None, {"default": own}),
        ({"tools": "{{ 1 }}"}, own),
    ):
        processor.chat_template, processor.tokenizer.chat_template = on_processor, on_tokenizer
        assert find_template(processor) == own
        found = encode(loaded, ["Hi"], [families.photo(1)])
        assert torch.equal(found["input_ids"], expected["input_ids"])
        assert template_digest(processor) == digest and ControlTokens.of(processor) == control
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(ModelError, match="LlavaProcessor and its tokenizer have no chat template"):
        render(processor, "Hi")


@pytest.mark.parametrize("template", [ADDED, TRIMMED, TESTED, ON_TWO_LINES])
def test_a_template_that_takes_a_text_gets_one(loaded: LoadedModel, template: str) -> None:
    processor = loaded.processor
    processor.chat_template = template
    assert render_conversation(processor, TALK) == (
        "user: Hi\nassistant: Yes?\nuser: What?\nassistant: "
    )
    assert render(processor, "Hi", 2) == "user: <image>\n<image>\nHi\nassistant: "
    markup = find_markup(loaded)
    after = processor.tokenizer.encode("\n", add_special_tokens=False)
    assert (markup.before, markup.after) == ([], after)
    broken = encode(loaded, ["a <image> b"], [families.photo(1)])["input_ids"][0].tolist()
    plain = encode(loaded, ["a b"], [families.photo(1)])["input_ids"][0].tolist()
    image = loaded.model.config.image_token_id
    assert broken.count(image) == plain.count(image) == 4


def test_a_template_for_texts_needs_a_token_for_pictures(loaded: LoadedModel) -> None:
    loaded.processor.chat_template = ADDED
    loaded.processor.image_token = None
    assert render(loaded.processor, "Hi") == "user: Hi\nassistant: "
    with pytest.raises(ModelError, match=r"takes text alone.*set processor\.image_token"):
        render(loaded.processor, "Hi", 1)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no talk today') }}", "no talk today"),
        ("{{ messages[0]['name'] + 'x' }}", "has no attribute 'name'"),
        ("{{ messages[0]['role'] + 5 }}", "can only concatenate str"),
        ("Hello.", "it writes the text of no message"),
        ("{% if %}", "Expected an expression"),
        ("{{ 'never closed }}", "unexpected char"),
    ],
)
@pytest.mark.parametrize("owner", ["processor", "tokenizer"])
def test_a_template_that_fails_is_named(
    loaded: LoadedModel, owner: str, template: str, reason: str
) -> None:
    processor = loaded.processor
    processor.chat_template = template if owner == "processor" else None
    processor.tokenizer.chat_template = template
    with pytest.raises(ModelError) as caught:
        render_conversation(processor, TALK)
    message = str(caught.value)
    assert f"the chat template of the {owner} ({template[:40]!r}" in message
    assert "user: text, assistant: text, user: text" in message and reason in message


def test_a_processor_that_does_not_know_its_patches_says_how_to_set_them(
    loaded: LoadedModel,
) -> None:
    processor = loaded.processor
    for name, where in (
        ("patch_size", "model.config.vision_config.patch_size"),
        ("vision_feature_select_strategy", "model.config.vision_feature_select_strategy"),
    ):
        known = getattr(processor, name)
        setattr(processor, name, None)
        with pytest.raises(ModelError, match=f"has no {name}.*processor.{name} = {where}"):
            encode(loaded, ["Hi"], [families.photo(1)])
        encode(loaded, ["Hi"], [None])
        setattr(processor, name, known)
    assert processor.patch_size == loaded.model.config.vision_config.patch_size
    encode(loaded, ["Hi"], [families.photo(1)])
