"""Derives what text gates read from the token ids of a request: see ``model.text_only``.

vLLM hands over a prompt's tokens, pictures expanded, so this is the derivation that an attached
guard makes, with the words of pictures put where ``prepare`` puts them: at the end of their turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlm_safeguard.data.ocr import with_words
from vlm_safeguard.engines.vllm.messages import Order, guard_digest
from vlm_safeguard.errors import GuardRuntimeError
from vlm_safeguard.guard import Guard, reads_text
from vlm_safeguard.model.chat import render
from vlm_safeguard.model.control_tokens import ControlTokens
from vlm_safeguard.model.text_only import PROBE
from vlm_safeguard.model.text_reader import TextReader
from vlm_safeguard.runtime.further_readings import FurtherReadings, find_readings


class TextForms:
    """Writes the order for a request."""

    def __init__(self, guard: Guard, processor: Any) -> None:
        config = guard.config
        self._markup, self._tokenizer = config.markup, processor.tokenizer
        self._control = ControlTokens.of(processor)
        self._digest = guard_digest(guard)
        has_text_gates = any(gate.source == "text" for gate in config.gates)
        self._reads_text = reads_text(guard)
        self._by_sentence = config.reads_sentences
        self._reads_means = config.frame is not None
        self._probe = config.probe
        self._reader = TextReader(processor) if has_text_gates else None
        self._turn_end = render(processor, PROBE).rpartition(PROBE)[2]

    def order(
        self,
        ids: Sequence[int],
        pictures: Sequence[range],
        words: Sequence[str],
        canary: bool = False,
    ) -> Order:
        """The order for a request.

        Args:
            ids: its token ids, with pictures expanded.
            pictures: where each picture stands in ``ids``, in order.
            words: the words in each picture, if the guard reads them.
            canary: see ``Order``.

        Raises:
            UnreadableText: see ``TextReader``.
            GuardRuntimeError: there is an image token without a picture, no text, or words whose
                place in the text is not found.
        """
        ids = list(ids)
        self._check_image_tokens(ids, pictures)
        if not self._reads_text:
            return Order(self._digest, [], canary=canary)
        kept = self._markup.kept(ids)
        if not kept:
            raise GuardRuntimeError("the request has no text besides its pictures")
        text = [ids[place] for place in kept]
        if any(words):
            # The number of kept tokens in front of each picture.
            places = [sum(place < picture.start for place in kept) for picture in pictures]
            text = self._with_words(text, places, words)
        further = FurtherReadings()
        if self._reader is not None:
            further = find_readings(self._reader, [text], [bool(pictures)], self._by_sentence)
        readings = (*further.canonical, *further.turns, *further.sentences)
        first = len(further.canonical)  # the text itself, or its canonical form
        return Order(
            self._digest,
            [one + self._probe for one in (text, *(reading.ids for reading in readings))],
            judged=list(range(first, first + 1 + len(further.turns))),
            wordless=bool(further.wordless),
            canary=canary,
            uncached=self._reads_means,
        )

    def _check_image_tokens(self, ids: list[int], pictures: Sequence[range]) -> None:
        inside = {place for picture in pictures for place in picture}
        tokens = set(self._markup.token_ids)
        for picture in pictures:  # tokens around a picture may belong to its markup
            for step, edge in ((-1, picture.start - 1), (1, picture.stop)):
                while 0 <= edge < len(ids) and edge not in inside and ids[edge] in tokens:
                    inside.add(edge)
                    edge += step
        if any(token in tokens and place not in inside for place, token in enumerate(ids)):
            raise GuardRuntimeError("the prompt has an image token without a picture: take it out")

    def _with_words(
        self, text: list[int], places: Sequence[int], words: Sequence[str]
    ) -> list[int]:
        """The ids of a text with the words of its pictures at the end of their turns.

        ``places``: the number of the text's tokens in front of each picture.
        """
        written = self._decoded(text[: places[0]])
        waiting: list[str] = []
        for number, place in enumerate(places):
            waiting += filter(None, [words[number]])
            end = places[number + 1] if number + 1 < len(places) else len(text)
            part = self._decoded(text[place:end])
            said, mark, rest = part.partition(self._turn_end)
            if waiting and mark:
                said = with_words(said, self._control.broken(" ".join(waiting)))
                waiting = []
            written += said + mark + rest
        if waiting:
            raise GuardRuntimeError(
                "the words in a picture belong at the end of its turn, and the prompt has no such "
                "place: write it with the model's chat template"
            )
        found = self._tokenizer(written, add_special_tokens=False)["input_ids"]
        if self._control.count(found) != self._control.count(text):
            raise GuardRuntimeError("the words in a picture would write a control token")
        return list(found)

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)) if ids else ""
