"""Reads the text of a request out of its token ids, with the processor of the model."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

from vlm_safeguard.errors import ModelError
from vlm_safeguard.model.chat import process, render


class TextReader:
    """Says which requests have no words."""

    def __init__(self, processor: Any) -> None:
        self._tokenizer = processor.tokenizer
        self._wordless = _wordless(processor)

    def has_words(self, ids: list[int]) -> bool:
        """Whether the text of a request is more than what the chat template writes around none.

        Several turns, or a system message, count as words.
        """
        return self._wordless is None or _letters(self._decoded(ids)) != self._wordless

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)) if ids else ""


def _letters(text: str) -> str:
    return "".join(text.split())


def _wordless(processor: Any) -> str | None:
    """What the template writes for a request without words, but for white space; None if it takes
    none."""
    try:
        ids = process(processor, [render(processor, "", 0)], [[]])["input_ids"][0]
    except (ModelError, TemplateError):
        return None
    return _letters(processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
