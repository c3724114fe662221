"""Image markup and text-only input by the processor and template of every family."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from torch import Tensor

from tests import families
from tests.families import FAMILIES, Family
from tests.model.family_helpers import PROMPTS, loaded_of
from vlm_safeguard.artifact.config import ImageMarkup
from vlm_safeguard.errors import ModelError
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.text_only import (
    find_markup,
    image_token,
    text_columns,
    text_only,
)


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
    """Rows of the text-only prompt of pictured requests."""
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
    """The text-only prompt of a conversation, and what the template makes of its text alone."""

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
    picture, or where pictures have newlines of their own: those of a user between them are lost.
    Every template takes several pictures; of PaliGemma there is no reading at all."""
    family = FAMILIES[name]
    loaded = loaded_of(family)
    markup = find_markup(loaded)
    exact = loaded.processor.chat_template != families.IDEFICS_TEMPLATE and family.inner != "\n"
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
    assert markup.before == markup.after == []
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
