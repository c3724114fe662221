"""Ends the stream of a generation that failed, so that nobody waits for the rest of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def ended_on_error(*given: Any) -> Iterator[None]:
    """Around a generation: end the streamer among what it was ``given``, if any, on any exception.

    transformers ends a streamer only after the last token. A ``TextIteratorStreamer`` would let the
    thread that reads it wait for ever.
    """
    try:
        yield
    except BaseException:
        for streamer in given:
            if callable(end := getattr(streamer, "end", None)):
                with suppress(Exception):  # the error of the generation is the one to report
                    end()
        raise
