"""Recovers a request's text from its token ids."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from vlm_safeguard.errors import ModelError, UnreadableText
from vlm_safeguard.model.canonical_text import canonical_text
from vlm_safeguard.model.chat import prepare, process, render
from vlm_safeguard.model.control_tokens import ControlTokens
from vlm_safeguard.model.refusals import judge_answer
from vlm_safeguard.model.sentences import says_enough, sentences
from vlm_safeguard.model.text_only import PROBE

_REPLY = "In an oven."  # to ``PROBE``


@dataclass(frozen=True)
class Parts:
    """Parts of a request, each as the token ids of a request of its own, in canonical form.

    Attributes:
        last_turn: the user's last turn that has words. None if nothing else is in the request, or
            if the template marks turns with words that a user can type.
        sentences: of that turn, if it has more than one (see ``sentences``), and of earlier turns
            that were not refused. Where turns are not known, of all that stands in the request.
    """

    last_turn: list[int] | None
    sentences: list[list[int]]


class TextReader:
    """Says which requests have no words, which have a canonical form of their own, and what parts
    they have."""

    def __init__(self, processor: Any) -> None:
        self._tokenizer, self._control = processor.tokenizer, ControlTokens.of(processor)
        # The token for unknown characters is written like a control token.
        self._apart = self._control.ids | {self._tokenizer.unk_token_id}
        wordless = _written(processor, "")
        self._wordless = None if wordless is None else _letters(wordless)
        # What the template writes before and behind a request; empty if it takes none.
        self._before, _, self._after = (_written(processor, PROBE) or "").partition(PROBE)
        # What begins a user's later turn, if nobody can type it, and an assistant's.
        self._turn, self._answer = _marks(processor, self._control)
        written = sorted(self._control.texts, key=len, reverse=True)
        self._control_text = re.compile("|".join(map(re.escape, written)) or "(?!)")

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

    def parts(self, ids: list[int]) -> Parts:
        """What is read of a request beside the whole of it: the user's last turn alone, because
        what a gate reads of a conversation hides what its last turn asks for, and sentences."""
        written = self._decoded(ids).removesuffix(self._after)
        said = written.removeprefix(self._before)
        in_turns = bool(self._turn and self._control_text.search(said))
        turns = self._turns(written) if in_turns else [canonical_text(said).strip()]
        *earlier, last = turns or [""]
        before = "\n".join(earlier)
        found = sentences(last)
        found += sentences(before) or [before] if says_enough(before) else []
        turn = self._request(last) if in_turns and last else None
        return Parts(turn, list(map(self._request, found)))

    def _turns(self, written: str) -> list[str]:
        """The user's turns that have words, in canonical form, without those that were refused. The
        last one is always among them.

        Messages of the user that follow one another, without an answer between them, are one turn.
        A made-up refusal is one for the model too.

        Args:
            written: a request without what the template writes behind it.
        """
        head, *pieces = written.split(self._turn)
        if not self._before.endswith(self._turn):  # the first turn begins otherwise
            pieces.insert(0, head.removeprefix(self._before))
        turns: list[tuple[list[str], str]] = []  # messages, and what answers them
        for piece in pieces:
            words, _, answer = piece.partition(self._answer)
            if not self._control_text.search(self._answer):  # a user can type it, and go on
                words = piece
            message = canonical_text(" ".join(self._control_text.split(words))).strip()
            if turns and not turns[-1][1]:
                turns[-1] = [*turns[-1][0], message], answer
            else:
                turns.append(([message], answer))
        said = [(words, answer) for one, answer in turns if (words := "\n".join(filter(None, one)))]
        return [
            words
            for n, (words, answer) in enumerate(said)
            if n == len(said) - 1 or judge_answer(answer) != "refused"
        ]

    def _request(self, words: str) -> list[int]:
        """The ids of a request of these words."""
        written = self._before + self._control.broken(words) + self._after
        return list(self._tokenizer(written, add_special_tokens=False)["input_ids"])

    def _controls(self, ids: list[int]) -> list[int]:
        return [token for token in ids if token in self._control.ids]

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)) if ids else ""


def _marks(processor: Any, control: ControlTokens) -> tuple[str, str]:
    """What the template writes before a user's later turn, from a control token on, and before the
    assistant's; both empty if it takes no such conversation, or writes no such token there.

    The former is not the end of the latter, as the last token alone may be (Llama 3).
    """
    turns = [("user", PROBE), ("assistant", _REPLY), ("user", PROBE)]
    talk = [{"role": role, "content": text} for role, text in turns]
    try:
        ids = prepare(processor, [talk])["input_ids"][0]
    except ModelError:
        return "", ""
    written = str(processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    between = written.partition(PROBE)[2].rpartition(PROBE)[0]
    answer, found, turn = between.partition(_REPLY)
    if not found:
        return "", ""
    places = {place for text in control.texts for place in _places(turn, text)}
    marks = (turn[place:] for place in sorted(places, reverse=True))
    mark = next((mark for mark in marks if not answer.endswith(mark)), "")
    return (mark, answer) if mark and answer.strip() else ("", "")


def _places(text: str, part: str) -> list[int]:
    return [found.start() for found in re.finditer(re.escape(part), text)]


def _letters(text: str) -> str:
    return "".join(text.split())


def _written(processor: Any, words: str) -> str | None:
    """A request as the template and the tokenizer write it; None if the template takes none."""
    try:
        ids = process(processor, [render(processor, words, 0)], [[]])["input_ids"][0]
    except ModelError:
        return None
    return str(processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
