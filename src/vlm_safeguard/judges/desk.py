"""One judge that many callers ask at once, each about one response.

A judge takes batches, and a local model cannot be asked from several threads; inspect_ai scores one
response at a time, from many. At the desk they wait for their turn.
"""

from __future__ import annotations

import atexit
import threading
from concurrent.futures import Future
from functools import lru_cache
from queue import Empty, Queue

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.judges.base import Judge, Judgement, Pair

AT_ONCE = 64  # responses at most that a judge without threads of its own is asked together

_Job = tuple[Pair, Future[Judgement]]


class Desk:
    """Asks ``judge`` on threads of its own: as many as its ``concurrency`` if it has one (an
    endpoint), each about one response; else on one thread, about what waits by then."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self._queue: Queue[_Job | None] = Queue()  # None: no more will come
        self._closing = threading.Event()
        count = getattr(judge, "concurrency", 1)
        self._most = 1 if count > 1 else AT_ONCE
        self._threads = [
            threading.Thread(target=self._run, daemon=True, name="judge") for _ in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, prompt: str, response: str) -> Future[Judgement]:
        """Queue one response; its judgement, or what went wrong, comes in the future."""
        answer: Future[Judgement] = Future()
        self._queue.put(((prompt, response), answer))
        return answer

    def close(self) -> None:
        """Cancel what waits and return when the threads have ended: one that still runs while the
        interpreter shuts down can take the process with it. Nothing may be submitted later."""
        self._closing.set()
        self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            jobs = [job]
            while len(jobs) < self._most:
                try:
                    job = self._queue.get_nowait()
                except Empty:
                    break
                if job is None:
                    self._queue.put(None)  # found again when these are done
                    break
                jobs.append(job)
            if self._closing.is_set():
                for _, answer in jobs:
                    answer.cancel()
            if jobs := [job for job in jobs if job[1].set_running_or_notify_cancel()]:
                self._answer(jobs)
        self._queue.put(None)  # for the next thread

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


@lru_cache
def _desk(judge: Judge) -> Desk:
    made = Desk(judge)
    atexit.register(made.close)  # also by an interrupt
    return made
