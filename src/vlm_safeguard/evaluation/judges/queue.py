"""Batches the requests of many callers to one judge."""

from __future__ import annotations

import atexit
from functools import lru_cache

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.judges.judgement import Judge, Judgement, Pair
from vlm_safeguard.utils.worker import Worker

AT_ONCE = 64  # responses at most that a judge without threads of its own is asked together


def queue_for(judge: Judge) -> Worker[Pair, Judgement]:
    """Asks ``judge`` on threads of its own: as many as its ``concurrency`` if it has one (an
    endpoint), each about one response; else on one thread, about what waits by then.

    A judge that is of no use (it raises one of our errors) fails all that it is asked together.
    """
    threads = getattr(judge, "concurrency", 1)
    at_once = 1 if threads > 1 else AT_ONCE
    hopeless = (SafeguardError,)
    return Worker(judge.judge, "judge", at_once, threads=threads, hopeless=hopeless)


@lru_cache
def shared_queue(judge: Judge) -> Worker[Pair, Judgement]:
    """The one queue for ``judge``, whichever tasks share it."""
    made = queue_for(judge)
    atexit.register(made.close)  # also by an interrupt
    return made
