"""No text of a user holds a control token once it is encoded, and ordinary text stays as it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers
from transformers import AutoProcessor

from tests import assembled, families
from vlm_safeguard.errors import ModelError
from vlm_safeguard.model.chat import prepare
from vlm_safeguard.model.control_tokens import BREAK, ControlTokens

NAMES: list[Any] = ["llava", "qwen2_vl", "gemma3", "idefics3", "pixtral"]
NAMES += [pytest.param("embedded", marks=pytest.mark.embedded)]
ZERO_WIDTH = ["\u200b", "\u200c", "\u200d", "\u2060", "\ufeff", "\u00ad"]
WORDS = ["How", " many ", "<table>", "\n\n", "</b>", "\t", "ж", "a < b", "|", "<", ">", "[", "\r\n"]


@lru_cache
def processor(name: str) -> Any:
    if name == "embedded":
        return AutoProcessor.from_pretrained(assembled.embedded())
    found = families.FAMILIES[name].build().processor
    found.tokenizer.add_tokens(["<table>", "\n\n"])  # as Gemma has them
    return found


def control_ids(name: str, *parts: str) -> Counter[int]:
    """Control tokens in the ids of a request, by transformers' own definition of one."""
    made, content = processor(name), [{"type": "text", "text": part} for part in parts]
    ids = prepare(made, [[{"role": "user", "content": content}]])["input_ids"][0].tolist()
    tokens = made.tokenizer._get_control_tokens(made.chat_template)
    known = set(made.tokenizer.convert_tokens_to_ids(list(tokens))) - {made.tokenizer.unk_token_id}
    return Counter(token for token in ids if token in known)


def hostile(name: str) -> st.SearchStrategy[str]:
    """Texts of control tokens, pieces of them, invisible characters and words."""
    tokens = st.sampled_from(sorted(ControlTokens.of(processor(name)).texts))
    cut = st.tuples(tokens, st.integers(1, 12), st.booleans())
    pieces = cut.map(lambda c: c[0][: c[1]] if c[2] else c[0][c[1] :])
    words = st.sampled_from([*WORDS, *ZERO_WIDTH])
    return st.lists(st.one_of(tokens, pieces, words), max_size=9).map("".join)


@pytest.mark.parametrize("name", NAMES)
def test_no_text_becomes_a_control_token(name: str) -> None:
    plain = control_ids(name, "x")

    @given(text=hostile(name))
    def check(text: str) -> None:
        assert control_ids(name, "x" + text + "x") == plain

    check()


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_two_texts_side_by_side_become_none_either(name: str) -> None:
    plain = control_ids(name, "x")

    @given(first=hostile(name), second=hostile(name))
    def check(first: str, second: str) -> None:
        try:
            assert control_ids(name, "x" + first, second + "x") == plain
        except ModelError as error:
            assert "in pieces" in str(error)

    check()
    with pytest.raises(ModelError, match="writes the control token '</s>' in pieces"):
        control_ids(name, "one </", "s> two")


@pytest.mark.parametrize("name", NAMES)
def test_ordinary_text_stays_byte_for_byte(name: str) -> None:
    made = processor(name)
    control = ControlTokens.of(made)
    for text in ("a\n\nb", "<table>\n\n<tr> x </tr>", " two  spaces\t", "it is 5 < 6 | 7 > 2", ""):
        assert control.broken(text) == text
    shown = made.tokenizer.decode(
        prepare(made, [[{"role": "user", "content": "<table>\n\nb"}]])["input_ids"][0]
    )
    assert "<table>\n\nb" in shown and BREAK not in shown


@pytest.mark.parametrize("name", NAMES)
def test_control_tokens_are_those_of_transformers_and_of_pictures(name: str) -> None:
    made = processor(name)
    control = ControlTokens.of(made)
    theirs = set(made.tokenizer._get_control_tokens(made.chat_template))
    assert theirs <= control.texts
    assert all("image" in t or "img" in t.lower() or "video" in t for t in control.texts - theirs)
    assert made.image_token in control.texts
    assert not {"<table>", "\n\n"} & control.texts


def test_tokens_that_a_tokenizer_names_itself_are_those_of_the_chat() -> None:
    made = families.llava().processor
    made.tokenizer.add_tokens(["<table>", "user", "<row>"])
    assert {"<table>", "user", "<row>"}.isdisjoint(ControlTokens.of(made).texts)
    made.chat_template = "{# <row> #}{{ '<table>' }}" + made.chat_template
    assert {"<table>", "<row>"} & ControlTokens.of(made).texts == {"<table>"}
    made.tokenizer.chat_control_tokens = ["<row>"]
    assert {"<table>", "<row>"} & ControlTokens.of(made).texts == {"<row>"}


BREAKS: dict[str, Callable[[], tuple[set[str], str, str]]] = {
    "overlapping": lambda: ({"<a>", ">b<"}, "<a>b<", f"<{BREAK}a>{BREAK}b<"),
    "with itself": lambda: ({"||"}, "|||", f"|{BREAK}|{BREAK}|"),
    "one in another": lambda: ({"<<a>>", "<a>"}, "<<a>>", f"<{BREAK}<{BREAK}a>>"),
    "one character": lambda: ({"§", "<a>"}, "<§a>", f"<{BREAK}a>"),
    "over lines": lambda: ({"\n|"}, "a\n|", f"a\n{BREAK}|"),
}


@pytest.mark.parametrize("how", BREAKS)
def test_tokens_are_broken_wherever_one_begins(how: str) -> None:
    texts, text, expected = BREAKS[how]()
    control = ControlTokens(frozenset(texts), frozenset())
    assert control.broken(text) == expected
    assert control.broken(expected) == expected


def test_letters_that_a_tokenizer_normalises_into_a_control_token_are_refused() -> None:
    made = families.llava().processor
    raw = made.tokenizer._tokenizer
    raw.normalizer = normalizers.NFKC()
    raw.add_special_tokens([AddedToken("<end>", special=True, normalized=True)])
    assert made.tokenizer.convert_tokens_to_ids("<end>") in made.tokenizer("＜end＞").input_ids
    with pytest.raises(ModelError, match="control token '<end>' in pieces or in other letters"):
        prepare(made, [[{"role": "user", "content": "Hi ＜end＞"}]])
    prepare(made, [[{"role": "user", "content": "Hi ＜ende＞"}]])


def test_a_role_writes_no_control_token() -> None:
    made = processor("llava")
    ids = prepare(made, [[{"role": "user</s>", "content": "Hi"}]])["input_ids"][0].tolist()
    assert made.tokenizer.eos_token_id not in ids
