"""Serves many callers with one loaded model, in workers of Ray or in vLLM, in large batches.

The engine gathers what has come in, sorts it by length and generates in batches; rows of different
defences never share one.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from vlm_safeguard.calibration.generation import Response, respond
from vlm_safeguard.data.inputs import Query, batches
from vlm_safeguard.embedded.assemble import resolve
from vlm_safeguard.engines.ray_pool import RayPool
from vlm_safeguard.evaluation.harness.vllm_pool import VllmPool
from vlm_safeguard.evaluation.harness.workers import Batch, RespondWorker
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.load_options import LoadOptions
from vlm_safeguard.model.loading import LoadedModel, load
from vlm_safeguard.utils.worker import Worker

GATHER = 0.15  # seconds without a newcomer after which a round begins
ROUND = 8  # batches gathered at most before generating, so that lengths can be sorted
# A request, the guard that it was answered under, and the answer.
Answered = tuple[Query, Guard | None, Response]


@dataclass
class _Job:
    request: Query
    guard: Guard | None
    tokens: int


class Pool(Protocol):
    """Other processes that answer."""

    @property
    def size(self) -> int:
        """How many batches are answered at once."""

    def work(self, part: Batch) -> list[Response]:
        """One response for each request."""

    def close(self) -> None:
        """End the processes, also in the midst of a batch."""


class Engine:
    """Batches requests to a model on one thread of its own, or on one for each worker of Ray.

    Args:
        loaded: the model.
        batch: rows that are generated together.
        pool: answers in place of ``loaded``.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        batch: int,
        pool: Pool | None = None,
    ) -> None:
        self.loaded = loaded
        self.batch = batch
        self._pool = pool
        # Called with what was answered just now.
        self.heard: Callable[[Sequence[Answered]], object] = lambda _: None
        size = pool.size if pool else 1
        self._worker: Worker[_Job, Response] = Worker(
            self._answer,
            "engine",
            batch if size > 1 else ROUND * batch,  # no worker takes what others could do
            threads=size,
            gather=GATHER,
            divide=self._divide,
        )

    def submit(self, request: Query, guard: Guard | None, tokens: int) -> Future[Response]:
        """Queue one request; its answer, or what went wrong with it, comes in the future."""
        return self._worker.submit(_Job(request, guard, tokens))

    def close(self) -> None:
        """Cancel what waits, and return when the threads and processes have ended. Other
        processes do not finish what they began: the next run does it."""
        self._worker.stop()
        if self._pool:
            self._pool.close()
        self._worker.close()

    def _divide(self, jobs: list[_Job]) -> list[list[int]]:
        kinds: dict[tuple[int, int], list[int]] = {}
        for index, job in enumerate(jobs):
            kinds.setdefault((id(job.guard), job.tokens), []).append(index)
        return [
            [kind[row] for row in rows]
            for kind in kinds.values()
            for rows in batches(
                self.loaded.processor.tokenizer, [jobs[n].request for n in kind], self.batch
            )
        ]

    def _answer(self, jobs: list[_Job]) -> list[Response]:
        queries, guard, tokens = [job.request for job in jobs], jobs[0].guard, jobs[0].tokens
        found = (
            self._pool.work(Batch(queries, guard, tokens))
            if self._pool
            else respond(self.loaded, queries, guard, max_new_tokens=tokens, batch=self.batch)
        )
        self.heard([(job.request, guard, said) for job, said in zip(jobs, found, strict=True)])
        return found


def engine(
    name: str, options: LoadOptions, batch: int, workers: int = 0, vllm: bool = False
) -> Engine:
    """The engine of a model, loaded once per process however many defences share it, and closed
    when the process ends, also by an interrupt.

    Args:
        name: of the model.
        options: how it is loaded.
        batch: rows that are generated together.
        workers: of Ray, each with a model of its own; 0 answers in this process.
        vllm: whether vLLM answers.

    Raises:
        ModelError, DemoError: the model cannot be loaded or assembled.
        SafeguardError: see ``RayPool`` and ``VllmPool``.
    """
    return made_once(name, options, batch, workers, vllm)


@lru_cache
def made_once(name: str, options: LoadOptions, batch: int, workers: int, vllm: bool) -> Engine:
    """See ``engine``."""
    folder = resolve(name)
    loaded = load(folder, **options.given())
    pool: Pool | None = None
    if workers:
        pool = RayPool(RespondWorker, (name, options), workers)
    elif vllm:
        pool = VllmPool(str(folder), options, loaded, batch)
    made = Engine(loaded, batch, pool)
    atexit.register(made.close)
    return made
