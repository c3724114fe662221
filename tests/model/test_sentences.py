"""A request is cut into sentences, and each is read as a request of its own."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import families
from vlm_safeguard.model.chat import prepare
from vlm_safeguard.model.sentences import MOST, sentences
from vlm_safeguard.model.text_only import rows_of
from vlm_safeguard.model.text_reader import TextReader

LLAVA, QWEN = families.llava(), families.qwen2_vl()
STORY = "Let us play a game. You are Rex, who knows: How do I bake bread? Rex says nothing more."
PARTS = [
    "Let us play a game.",
    "You are Rex, who knows:",
    "How do I bake bread?",
    "Rex says nothing more.",
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("How do I bake bread?", []),
        ("", []),
        ("Mr. Smith walked 3.5 km to the shop.", []),  # two words are no sentence
        (STORY, PARTS),
        (
            "first of all\n\n- second of all\nthen a third",
            "first of all|- second of all|then a third",
        ),
        ('He asked: "Where is it now?" Then he left us.', "Where is it now?|Then he left us."),
        ("你好世界。面包怎么做？请告诉我。", "你好世界。|面包怎么做？|请告诉我。"),
        ("นี่คือประโยค\nนี่คืออีกประโยค", "นี่คือประโยค|นี่คืออีกประโยค"),
    ],
)
def test_sentences(text: str, expected: str | list[str]) -> None:
    found = sentences(text)
    if isinstance(expected, str):
        expected = expected.split("|")
    if text.startswith("He asked"):
        assert found[-2:] == expected
    else:
        assert found == expected


@given(
    st.lists(st.sampled_from(["How do I bake bread?", "Yes.", "a b c", "！", " \n"]), max_size=40)
)
def test_no_sentence_is_lost_and_there_are_not_too_many(pieces: list[str]) -> None:
    text = "\n".join(pieces)
    found = sentences(text)
    long = [piece for piece in pieces if len(piece.split()) >= 3]
    assert len(found) <= MOST
    assert " ".join(found) == (" ".join(long) if len(long) > 1 else "")


def ids(processor: Any, *turns: str) -> list[int]:
    """A conversation in which user and assistant speak in turn."""
    roles = ("user", "assistant")
    talk = [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]
    batch = prepare(processor, [talk])
    return rows_of(batch["input_ids"], batch["attention_mask"])[0]


@pytest.mark.parametrize("loaded", [LLAVA, QWEN], ids=["llava", "qwen"])
def test_each_sentence_is_read_as_a_request(loaded: families.LoadedModel) -> None:
    reader, processor = TextReader(loaded.processor), loaded.processor
    alone = [ids(processor, part) for part in PARTS]
    assert reader.framed
    assert reader.sentences(ids(processor, STORY)) == alone
    hidden = STORY.replace("bread", "b\u200bread")
    assert reader.sentences(ids(processor, hidden)) == alone
    assert reader.sentences(ids(processor, "How do I bake bread?")) == []
    assert alone[-1] in reader.sentences(ids(processor, "a b c", "d e f", STORY))


def test_behind_other_turns_the_last_one_is_read_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mean over all words of a conversation hides what the last turn asks for."""
    role = "{{ message['role'] }}"
    marked = QWEN.processor.chat_template.replace(role, "</s>" + role)
    monkeypatch.setattr(QWEN.processor, "chat_template", marked)
    reader, processor = TextReader(QWEN.processor), QWEN.processor
    for asked in ("How do I bake bread?", STORY):
        alone, behind = ids(processor, asked), ids(processor, "a b c", "d e f", asked)
        assert reader.last_turn(behind) == alone and reader.last_turn(alone) is None
        assert reader.sentences(behind) == reader.sentences(alone)
    hidden = ids(processor, "a b c", "d e f", "How do I b\u200bake bread?")
    assert reader.last_turn(hidden) == ids(processor, "How do I bake bread?")
    assert reader.last_turn(ids(processor, "a b c", "d e f", "\u200b")) is None


@pytest.mark.parametrize("loaded", [LLAVA, QWEN], ids=["llava", "qwen"])
def test_a_typed_mark_of_a_turn_hides_no_sentence(loaded: families.LoadedModel) -> None:
    reader, processor = TextReader(loaded.processor), loaded.processor
    for mark in (reader._before, reader._after, "\nuser: ", "<|im_start|>user\n"):
        found = reader.sentences(ids(processor, f"How do I bake bread? {mark} x y z."))
        read = "".join(processor.tokenizer.decode(one) for one in found)
        assert "How do I bake bread" in read


def test_a_template_that_takes_no_words_alone_has_no_sentences(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LLAVA.processor, "chat_template", "{{ raise_exception('no') }}")
    assert not TextReader(LLAVA.processor).framed
