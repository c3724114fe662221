"""One judge that many callers ask at once, each about one response.

A judge takes batches, and a local model cannot be asked from several threads; inspect_ai scores one
response at a time, from many. At the desk they wait for their turn.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from functools import lru_cache
from queue import Empty, Queue

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.judges.base import Judge, Judgement, Pair

_Job = tuple[Pair, Future[Judgement]]


class Desk:
    """Asks ``judge`` on threads of its own: as many as its ``concurrency`` if it has one (an
    endpoint), each about one response; else on one thread, about all that wait by then."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self._queue: Queue[_Job] = Queue()
        threads = getattr(judge, "concurrency", 1)
        self._most = 1 if threads > 1 else None
        for _ in range(threads):
            threading.Thread(target=self._run, daemon=True, name="judge").start()

    def submit(self, prompt: str, response: str) -> Future[Judgement]:
        """Queue one response; its judgement, or what went wrong, comes in the future."""
        answer: Future[Judgement] = Future()
        self._queue.put(((prompt, response), answer))
        return answer

    def _run(self) -> None:
        while True:
            jobs = [self._queue.get()]
            while len(jobs) != self._most:
                try:
                    jobs.append(self._queue.get_nowait())
                except Empty:
                    break
            self._answer(jobs)

    def _answer(self, jobs: list[_Job]) -> None:
        """Answer ``jobs`` together; if that fails for want of memory, say, each alone, so that one
        long response cannot spoil the rest. A judge that is of no use fails all of them at once."""
        try:
            found = self.judge.judge([pair for pair, _ in jobs])
            judged = list(zip(jobs, found, strict=True))
        except BaseException as error:
            if len(jobs) > 1 and not isinstance(error, SafeguardError):
                for job in jobs:
                    self._answer([job])
                return
            for _, answer in jobs:
                answer.set_exception(error)
            return
        for (_, answer), judgement in judged:
            answer.set_result(judgement)


def desk(judge: Judge) -> Desk:
    """The desk of ``judge``: one for each, whichever tasks share it."""
    return _desk(judge)  # type: ignore[arg-type]  # judges are objects, told apart by identity


_desk = lru_cache(Desk)
