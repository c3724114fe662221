"""One loaded model that answers many callers, in large batches.

inspect_ai asks for one answer at a time, from many coroutines. The engine gathers what has come
in, sorts it by length and generates in batches; rows of different defences never share one.
"""

from __future__ import annotations

import atexit
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from queue import Empty, Queue

from vlm_safeguard.demo.assemble import assemble
from vlm_safeguard.evaluate.generate import Response, respond
from vlm_safeguard.guard import Guard
from vlm_safeguard.models import LoadedModel, load
from vlm_safeguard.requests import Request, batches

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
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="vlm-safeguard-engine")
        self._thread.start()

    def submit(self, request: Request, guard: Guard | None, tokens: int) -> Future[Response]:
        """Queue one request; its answer, or what went wrong with it, comes in the future."""
        answer: Future[Response] = Future()
        self._queue.put(_Job(request, guard, tokens, answer))
        return answer

    def close(self) -> None:
        """Cancel what waits and return when the thread has ended: one that still runs while the
        interpreter shuts down takes the process with it. Nothing may be submitted later."""
        self._closing.set()
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
                for rows in batches([job.request for job in group], self.batch):
                    self._begin([group[row] for row in rows])

    def _begin(self, jobs: list[_Job]) -> None:
        """Answer those of a batch that are still wanted: none while the engine closes."""
        if self._closing.is_set():
            for job in jobs:
                job.answer.cancel()
        wanted = [job for job in jobs if job.answer.set_running_or_notify_cancel()]
        if wanted:
            self._answer(wanted)

    def _answer(self, jobs: list[_Job]) -> None:
        """Answer a batch; if that fails each alone, so that one cannot spoil the rest."""
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
    """The engine of a model, loaded once per process however many defences share it, and closed
    when the process ends, also by an interrupt.

    Raises:
        ModelError, DemoError: the model cannot be loaded or assembled.
    """
    made = Engine(load(assemble() if name == "embedded" else name, dtype, device), batch)
    atexit.register(made.close)
    return made
