"""One loaded model that answers many callers, in large batches.

inspect_ai asks for one answer at a time, from many coroutines. The engine gathers what has come
in, sorts it by length and generates in batches; rows of different defences never share one.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from queue import Empty, Queue

from vlm_safeguard.demo.assemble import assemble
from vlm_safeguard.evaluate.generate import Response, respond
from vlm_safeguard.guard import Guard
from vlm_safeguard.models import LoadedModel, load
from vlm_safeguard.requests import Request

GATHER = 0.15  # seconds without a newcomer after which a round begins
ROUND = 8  # batches gathered at most before generating, so that lengths can be sorted


@dataclass
class _Job:
    request: Request
    guard: Guard | None
    tokens: int
    answer: Future[Response]


class Engine:
    """Batches requests to ``loaded`` on one thread of its own; ``batch`` rows at a time."""

    def __init__(self, loaded: LoadedModel, batch: int) -> None:
        self.loaded = loaded
        self.batch = batch
        self._queue: Queue[_Job | None] = Queue()  # None: no more will come
        self._thread = threading.Thread(target=self._run, daemon=True, name="vlm-safeguard-engine")
        self._thread.start()

    def submit(self, request: Request, guard: Guard | None, tokens: int) -> Future[Response]:
        """Queue one request; its answer, or what went wrong with it, comes in the future."""
        answer: Future[Response] = Future()
        self._queue.put(_Job(request, guard, tokens, answer))
        return answer

    def close(self) -> None:
        """Cancel what waits and return when the thread has ended: one that still runs while the
        interpreter shuts down can take the process with it. Nothing may be submitted later."""
        with suppress(Empty):
            while True:
                job = self._queue.get_nowait()
                if job is not None:
                    job.answer.cancel()
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            jobs = [job]
            while len(jobs) < ROUND * self.batch:
                try:
                    job = self._queue.get(timeout=GATHER)
                except Empty:
                    break
                if job is None:
                    self._queue.put(None)  # found again when this round is done
                    break
                jobs.append(job)
            kinds: dict[tuple[int, int], list[_Job]] = {}
            for job in jobs:
                kinds.setdefault((id(job.guard), job.tokens), []).append(job)
            for group in kinds.values():
                self._answer(group)

    def _answer(self, jobs: list[_Job]) -> None:
        """Answer all of ``jobs``; if that fails each alone, so that one cannot spoil the rest."""
        try:
            said = respond(
                self.loaded,
                [job.request for job in jobs],
                jobs[0].guard,
                max_new_tokens=jobs[0].tokens,
                batch=self.batch,
            )
        except BaseException as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._answer([job])
            else:
                jobs[0].answer.set_exception(error)
            return
        for job, response in zip(jobs, said, strict=True):
            job.answer.set_result(response)


@lru_cache
def engine(name: str, dtype: str, device: str, batch: int) -> Engine:
    """The engine of a model, loaded once per process however many defences share it.

    Raises:
        ModelError, DemoError: the model cannot be loaded or assembled.
    """
    return Engine(load(assemble() if name == "embedded" else name, dtype, device), batch)
