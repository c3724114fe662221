"""Measures the time cost of a defence relative to none."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

from vlm_safeguard.data.drawings import draw_text
from vlm_safeguard.data.inputs import Query
from vlm_safeguard.data.ocr import reader
from vlm_safeguard.evaluation.metrics import paired_timing
from vlm_safeguard.guard import Guard, reads_pictures
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.loading import LoadedModel

# A guard that reads pictures is timed on one with words in it, which it has not seen before.
WORDS_TO_READ = "Please tell me how to water the plants in the garden"


def time_ratios(
    loaded: LoadedModel,
    guard: Guard | None,
    items: Sequence[Query],
    *,
    reword: Callable[[str], str] = str,
    tokens: int = 24,
    pairs: int = 9,
) -> tuple[float, float]:
    """(time per token, time to first token) defended / not: medians of paired runs.

    The defended side has ``guard`` attached, if there is one, and its text passed through
    ``reword``. Reading pictures comes before and does not count.

    Each pair answers the same single request at once, in lockstep, once more to the first token
    with the other side going first. Decoding always runs ``tokens`` tokens, so that both do the
    same work.
    """
    plain = paired_timing.twin(loaded.model)
    found = []
    for n in range(pairs):
        item = items[n % len(items)]
        bare = encode(loaded, [item.text], [item.image])
        inputs = encode(loaded, [reword(item.text)], [item.image], reads_pictures(guard))
        with guard.attach(loaded.model, loaded.processor) if guard else nullcontext():
            found.append(
                paired_timing.side_by_side(
                    partial(paired_timing.write, plain, bare, tokens),
                    partial(paired_timing.write, loaded.model, inputs, tokens),
                    tokens,
                )
            )
    per_token = statistics.median(pair.per_token for pair in found)
    return per_token, statistics.median(pair.first for pair in found)


def request_ratio(
    loaded: LoadedModel,
    guard: Guard | None,
    items: Sequence[Query],
    *,
    reword: Callable[[str], str] = str,
    tokens: int = 24,
    pairs: int = 9,
) -> float:
    """Time of a whole request, defended / not: the median of paired runs, one after the other, in
    alternating order.

    From text and picture to the last of ``tokens`` tokens, preprocessing included. Where the guard
    reads pictures, so is reading one: both sides get a picture of words that was never read.

    Raises:
        SafeguardError: the guard reads pictures and the OCR library is missing.
    """
    reads = reads_pictures(guard)
    words = draw_text(WORDS_TO_READ) if reads else None
    if reads:
        reader()  # its models are loaded once per process, not per request

    def seconds(item: Query, defended: bool) -> float:
        own = guard if defended else None
        if reads:
            reader().forget()
        with own.attach(loaded.model, loaded.processor) if own else nullcontext():
            begin = time.perf_counter()
            text = reword(item.text) if defended else item.text
            picture = item.image if words is None else words
            inputs = encode(loaded, [text], [picture], reads_pictures(own))
            paired_timing.write(loaded.model, inputs, tokens)
            return time.perf_counter() - begin

    found = []
    for n in range(pairs):
        order = (False, True) if n % 2 else (True, False)
        took = {defended: seconds(items[n % len(items)], defended) for defended in order}
        found.append(took[True] / took[False])
    return statistics.median(found)
