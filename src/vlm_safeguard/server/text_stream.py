"""Turns tokens into text piece by piece, and ends at a stop sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class TextStream:
    """The text of one answer. Text that could begin a stop sequence is held back."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer._tokenizer
        self._tokens: list[int] = []
        self._decoded = ""
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = [word for word in stop if word]
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain after one more token; "" if none is."""
        piece = self._stream.step(self._tokenizer, token) or ""
        self._tokens.append(token)
        self._decoded += piece
        return self._cut(piece)

    def end(self) -> str:
        """The rest of the text. The stream waits for the end of a character that was cut."""
        if self.stopped:
            return ""
        whole = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        cut = whole[len(self._decoded) :] if whole.startswith(self._decoded) else ""
        text = self._cut(cut)
        rest, self._held = self._held, ""
        return text + rest

    def _cut(self, piece: str) -> str:
        text = self._held + piece
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, word) for word in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, word: str) -> int:
    """Characters at the end of ``text`` that ``word`` begins with."""
    for size in range(min(len(text), len(word) - 1), 0, -1):
        if text.endswith(word[:size]):
            return size
    return 0
