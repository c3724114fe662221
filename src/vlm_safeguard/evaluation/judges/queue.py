"""Batches the requests of many callers to one judge."""

from __future__ import annotations

import atexit
from concurrent.futures import Future
from functools import lru_cache

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.judges.judgement import Judge, Judgement, Pair
from vlm_safeguard.utils.worker import Worker

AT_ONCE = 64  # responses at most that a judge without threads of its own is asked together


class Desk:
    """Asks ``judge`` on threads of its own: as many as its ``concurrency`` if it has one (an
    endpoint), each about one response; else on one thread, about what waits by then.

    A judge that is of no use (it raises one of our errors) fails all that it is asked together.
    """

    def __init__(self, judge: Judge) -> None:
        threads = getattr(judge, "concurrency", 1)
        self._worker: Worker[Pair, Judgement] = Worker(
            judge.judge,
            "judge",
            1 if threads > 1 else AT_ONCE,
            threads=threads,
            hopeless=(SafeguardError,),
        )
        self.close = self._worker.close

    def submit(self, prompt: str, response: str) -> Future[Judgement]:
        """Queue one response; its judgement, or what went wrong, comes in the future."""
        return self._worker.submit((prompt, response))


def desk(judge: Judge) -> Desk:
    """The desk of ``judge``: one for each, whichever tasks share it."""
    return _desk(judge)  # type: ignore[arg-type]  # judges are objects, told apart by identity


@lru_cache
def _desk(judge: Judge) -> Desk:
    made = Desk(judge)
    atexit.register(made.close)  # also by an interrupt
    return made
