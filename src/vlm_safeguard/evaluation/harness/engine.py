"""Serves many callers with one loaded model, or with several in workers of Ray, in large batches.

The engine gathers what has come in, sorts it by length and generates in batches; rows of different
defences never share one.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache

from vlm_safeguard.calibration.generation import Response, respond
from vlm_safeguard.data.inputs import Query, batches
from vlm_safeguard.embedded.assemble import resolve
from vlm_safeguard.engines.ray_pool import RayPool
from vlm_safeguard.evaluation.harness.workers import Batch, RespondWorker
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.load_options import LoadOptions
from vlm_safeguard.model.loading import LoadedModel, load
from vlm_safeguard.utils.worker import Worker

GATHER = 0.15  # seconds without a newcomer after which a round begins
ROUND = 8  # batches gathered at most before generating, so that lengths can be sorted


@dataclass
class _Job:
    request: Query
    guard: Guard | None
    tokens: int


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
        pool: RayPool[Batch, list[Response]] | None = None,
    ) -> None:
        self.loaded = loaded
        self.batch = batch
        self._pool = pool
        self.heard: Callable[[int], object] = lambda _: None  # how many were answered just now
        self._worker: Worker[_Job, Response] = Worker(
            self._answer,
            "engine",
            batch if pool else ROUND * batch,  # no worker takes what others could do
            threads=len(pool.actors) if pool else 1,
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
        self.heard(len(jobs))
        return found


def engine(name: str, options: LoadOptions, batch: int, workers: int = 0) -> Engine:
    """The engine of a model, loaded once per process however many defences share it, and closed
    when the process ends, also by an interrupt.

    Args:
        name: of the model.
        options: how it is loaded.
        batch: rows that are generated together.
        workers: of Ray, each with a model of its own; 0 answers in this process.

    Raises:
        ModelError, DemoError: the model cannot be loaded or assembled.
        SafeguardError: see ``RayPool``.
    """
    return made_once(name, options, batch, workers)


@lru_cache
def made_once(name: str, options: LoadOptions, batch: int, workers: int) -> Engine:
    """See ``engine``."""
    loaded = load(resolve(name), **options.given())
    pool = RayPool(RespondWorker, (name, options), workers) if workers else None
    made = Engine(loaded, batch, pool)
    atexit.register(made.close)
    return made
