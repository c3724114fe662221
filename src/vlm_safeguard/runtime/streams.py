"""Ends the stream of a generation that failed, so that nobody waits for the rest of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
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
        _end(given)
        raise


def end_of_caller() -> None:
    """End the streamer of the ``generate`` that this call runs in, if it has one.

    A ``generate`` that goes round the guard is refused from within, in its first step, and hands
    its streamer to nothing on the way there: it is found among that function's arguments.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "generate" and "streamer" in frame.f_locals:
            _end([frame.f_locals["streamer"]])
            return
        frame = frame.f_back


def _end(given: Iterable[Any]) -> None:
    for streamer in given:
        if callable(end := getattr(streamer, "end", None)):
            with suppress(Exception):  # the error of the generation is the one to report
                end()
