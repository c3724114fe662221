"""Finds a tokenizer's control tokens and breaks them up in users' text.

Control tokens are those of transformers' ``apply_chat_template(sanitize_control_tokens=True)``, and
what a processor writes for a picture. Other added tokens, such as a tokenizer's own for "<table>"
or two line breaks, are ordinary text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import Environment, TemplateSyntaxError

from vlm_safeguard.model.chat_template import find_template

BREAK = "\u200b"  # a zero-width space


@dataclass(frozen=True)
class ControlTokens:
    """The control tokens of a model.

    Attributes:
        texts: how they are written.
        ids: their ids. The token for unknown characters is not among them, because ordinary text
            can hold such characters.
    """

    texts: frozenset[str]
    ids: frozenset[int]

    @classmethod
    def of(cls, processor: Any) -> ControlTokens:
        """The control tokens of a processor's tokenizer and chat template."""
        tokenizer = processor.tokenizer
        added = list(tokenizer.added_tokens_decoder.values())
        chat = getattr(tokenizer, "chat_control_tokens", None)
        if chat is None:
            written = _literals(find_template(processor) or "")
            # White space is ordinary text in a template (Gemma has tokens for line breaks).
            chat = [
                token.content
                for token in added
                if token.content in written and not token.content.isspace()
            ]
        special = [token.content for token in added if token.special]
        pictures = _of_pictures(processor, {token.content for token in added})
        texts = {*special, *tokenizer.all_special_tokens, *chat, *pictures}
        # What is not in the vocabulary has the id of unknown characters.
        ids = {*tokenizer.convert_tokens_to_ids(sorted(texts))} - {None}
        if tokenizer.unk_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            ids.discard(tokenizer.unk_token_id)
        return cls(frozenset(texts), frozenset(ids))

    def broken(self, text: str) -> str:
        """``text`` with a zero-width space in every control token, behind its first character.

        A control token of one character becomes a zero-width space. Other text is not changed.
        """
        single, longer = _patterns(self.texts)
        return longer.sub(rf"\g<0>{BREAK}", single.sub(BREAK, text))

    def count(self, ids: Iterable[int]) -> Counter[int]:
        """How often each control token occurs among ``ids``."""
        return Counter(id for id in ids if id in self.ids)


@lru_cache
def _patterns(texts: frozenset[str]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Matches tokens of one character, and the first character of the longer ones, also where they
    overlap."""

    def one_of(tokens: Iterable[str]) -> str:
        return "|".join(map(re.escape, sorted(tokens))) or "(?!)"  # (?!) matches nothing

    single = one_of(token for token in texts if len(token) == 1)
    longer = one_of(token for token in texts if len(token) > 1)
    return re.compile(single), re.compile(f"(?={longer}).", re.DOTALL)


@lru_cache
def _literals(template: str) -> str:
    """What a chat template can write of itself: its text and string constants.

    Of one that is no template: nothing. What is wrong with it is said where it is used.
    """
    parts = []
    try:
        for _, kind, value in Environment().lex(template):
            if kind == "data":
                parts.append(value)
            elif kind == "string":
                parts.append(_string(value))
    except TemplateSyntaxError:
        return ""
    return "\0".join(parts)  # no token across two of them


def _string(written: str) -> str:
    """The value of a string constant with its quotes, by Jinja's rules: unlike Python's, it may go
    over several lines."""
    escaped = written[1:-1].encode("ascii", "backslashreplace")
    return escaped.decode("unicode-escape")


def _of_pictures(processor: Any, added: set[str]) -> set[str]:
    """What a processor writes for pictures, videos and sound, by its attributes: its placeholders,
    which it replaces wherever they stand, and those added tokens that go with them."""
    written = {
        name: getattr(value, "content", value)
        for name, value in vars(processor).items()
        if name.endswith(("_token", "_tag"))
    }
    placeholders = {written.get(f"{what}_token") for what in ("image", "video", "audio")}
    return {
        text
        for text in written.values()
        if isinstance(text, str) and text.strip() and (text in added or text in placeholders)
    }
