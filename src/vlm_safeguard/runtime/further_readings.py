"""Further readings of a request's text, which the gates score too: its canonical form, the last
turn of a conversation, and each sentence of that."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from vlm_safeguard.model.text_only import padded
from vlm_safeguard.model.text_reader import TextReader
from vlm_safeguard.runtime.request import Request

ROWS = 32  # readings in a pass


@dataclass(frozen=True)
class Reading:
    """The token ids of a reading, and the row of the request that it is of."""

    row: int
    ids: list[int]


@dataclass
class FurtherReadings:
    """``wordless``: rows with a picture and no words, which have no reading."""

    canonical: list[Reading] = field(default_factory=list)
    turns: list[Reading] = field(default_factory=list)
    sentences: list[Reading] = field(default_factory=list)
    wordless: set[int] = field(default_factory=set)

    def batches(
        self, request: Request, like: Tensor, pad_id: int
    ) -> Iterator[tuple[list[int], Request, tuple[Tensor, Tensor]]]:
        """Rows of the request, a request of its own for their readings, and these: ids and mask
        (n, T). Where a row has a canonical form, the verdict is on that. The last turn has another.

        Args:
            like: ids of the request's text, for their dtype and device.
        """
        kinds = (self.canonical, True), (self.turns, True), (self.sentences, False)
        for readings, judged in kinds:
            for start in range(0, len(readings), ROWS):
                some = readings[start : start + ROWS]
                rows = [reading.row for reading in some]
                batch = padded([like.new_tensor(reading.ids) for reading in some], pad_id)
                yield rows, request.part(rows, judged=judged), batch


def find_readings(
    reader: TextReader, texts: Sequence[list[int]], pictured: Collection[bool], sentences: bool
) -> FurtherReadings:
    """The further readings of each row.

    Args:
        texts: ids of each row's text. pictured: whether a row has a picture.
        sentences: whether the last turn and each of its sentences are read by themselves.
    """
    found = FurtherReadings()
    for row, (text, seen) in enumerate(zip(texts, pictured, strict=True)):
        if seen and not reader.has_words(text):
            found.wordless.add(row)
            continue
        form = reader.other_form(text)
        if form is not None:
            found.canonical.append(Reading(row, form))
        if sentences:
            parts = reader.parts(text)
            if parts.last_turn is not None:
                found.turns.append(Reading(row, parts.last_turn))
            found.sentences += [Reading(row, one) for one in parts.sentences]
    # Shorter ones first: less padding, and the order in which they count in every engine.
    for readings in (found.canonical, found.turns, found.sentences):
        readings.sort(key=lambda reading: len(reading.ids))
    return found
