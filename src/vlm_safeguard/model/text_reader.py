"""Recovers a request's text from its token ids."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from vlm_safeguard.errors import ModelError, UnreadableText
from vlm_safeguard.model.canonical_text import canonical_text
from vlm_safeguard.model.chat import process, render
from vlm_safeguard.model.control_tokens import ControlTokens
from vlm_safeguard.model.sentences import sentences
from vlm_safeguard.model.text_only import PROBE


class TextReader:
    """Says which requests have no words, which have a canonical form of their own, what their last
    turn is, and what its sentences are."""

    def __init__(self, processor: Any) -> None:
        self._tokenizer, self._control = processor.tokenizer, ControlTokens.of(processor)
        # The token for unknown characters is written like a control token.
        self._apart = self._control.ids | {self._tokenizer.unk_token_id}
        wordless = _written(processor, "")
        self._wordless = None if wordless is None else _letters(wordless)
        # What the template writes before and behind a request; empty if it takes none.
        self._before, _, self._after = (_written(processor, PROBE) or "").partition(PROBE)
        # What begins a user's turn, if nobody can type it: earlier turns stand before it.
        place = max((self._before.rfind(token) for token in self._control.texts), default=-1)
        self._turn = self._before[place:] if place >= 0 else ""

    @property
    def framed(self) -> bool:
        """Whether it is known what the template writes around a request, so that sentences can be
        read."""
        return bool(self._before or self._after)

    def has_words(self, ids: list[int]) -> bool:
        """Whether the text of a request is more than what the chat template writes around none.

        Several turns, or a system message, count as words.
        """
        return self._wordless is None or _letters(self._decoded(ids)) != self._wordless

    def other_form(self, ids: list[int]) -> list[int] | None:
        """The ids of a request's text in canonical form; None if that is the text itself.

        Control tokens stay as they are. What only now writes one is broken up, as it is in the
        text that a user types.

        Raises:
            UnreadableText: the canonical form has other control tokens than the text.
        """
        said, canonical, before = [], [], list[int]()
        for apart, group in groupby(ids, self._apart.__contains__):
            piece = list(group)
            if apart:
                written = "".join(self._tokenizer.convert_ids_to_tokens(piece))
                said.append(written)
                canonical.append(written)
            else:
                # Some tokenizers drop a space where decoding starts: start one token earlier.
                lead = self._decoded(before)
                words = self._decoded(before + piece)
                words = words[len(lead) :] if words.startswith(lead) else self._decoded(piece)
                said.append(words)
                canonical.append(self._control.broken(canonical_text(words)))
            before = piece[-1:]
        if said == canonical:
            return None
        found = self._tokenizer("".join(canonical), add_special_tokens=False)["input_ids"]
        if not found:
            return None  # nothing but invisible characters, and no template
        if self._controls(found) != self._controls(ids):
            raise UnreadableText(
                "the request's text without its invisible characters would write a control token, "
                "so the guard cannot read it: take those characters out"
            )
        return list(found)

    def last_turn(self, ids: list[int]) -> list[int] | None:
        """The ids of a request that consists of the user's last turn alone, in canonical form: what
        a gate reads of a conversation hides what its last turn asks for.

        Returns:
            None if nothing stands before that turn, if it has no words, or if the template marks
            turns with words that a user can type.
        """
        words, turn = self._words(ids)
        said = canonical_text(turn)
        return self._request(said) if turn != words and said.strip() else None

    def sentences(self, ids: list[int]) -> list[list[int]]:
        """The ids of requests that consist of one sentence each of the user's last turn, in
        canonical form; none where that turn has fewer than two (see ``sentences``).

        If the template marks turns with words that a user can type, the sentences are those of all
        turns.
        """
        _, turn = self._words(ids)
        return [self._request(sentence) for sentence in sentences(canonical_text(turn))]

    def _words(self, ids: list[int]) -> tuple[str, str]:
        """What the template's frame holds, and the part of it that is the user's last turn."""
        written = self._decoded(ids).removesuffix(self._after)
        words = written.removeprefix(self._before)
        return words, written.rpartition(self._turn)[2] if self._turn else words

    def _request(self, words: str) -> list[int]:
        """The ids of a request of these words."""
        written = self._before + self._control.broken(words) + self._after
        return list(self._tokenizer(written, add_special_tokens=False)["input_ids"])

    def _controls(self, ids: list[int]) -> list[int]:
        return [token for token in ids if token in self._control.ids]

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)) if ids else ""


def _letters(text: str) -> str:
    return "".join(text.split())


def _written(processor: Any, words: str) -> str | None:
    """A request as the template and the tokenizer write it; None if the template takes none."""
    try:
        ids = process(processor, [render(processor, words, 0)], [[]])["input_ids"][0]
    except ModelError:
        return None
    return str(processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
