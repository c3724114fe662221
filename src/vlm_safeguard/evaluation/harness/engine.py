"""Serves many callers with one loaded model, in large batches.

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
    """Batches requests to ``loaded`` on one thread of its own; ``batch`` rows at a time."""

    def __init__(self, loaded: LoadedModel, batch: int) -> None:
        self.loaded = loaded
        self.batch = batch
        self.heard: Callable[[int], object] = lambda _: None  # how many were answered just now
        self._worker: Worker[_Job, Response] = Worker(
            self._answer, "engine", ROUND * batch, gather=GATHER, divide=self._divide
        )
        self.close = self._worker.close

    def submit(self, request: Query, guard: Guard | None, tokens: int) -> Future[Response]:
        """Queue one request; its answer, or what went wrong with it, comes in the future."""
        return self._worker.submit(_Job(request, guard, tokens))

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
        found = respond(
            self.loaded,
            [job.request for job in jobs],
            jobs[0].guard,
            max_new_tokens=jobs[0].tokens,
            batch=self.batch,
        )
        self.heard(len(jobs))
        return found


@lru_cache
def engine(name: str, options: LoadOptions, batch: int) -> Engine:
    """The engine of a model, loaded once per process however many defences share it, and closed
    when the process ends, also by an interrupt.

    Raises:
        ModelError, DemoError: the model cannot be loaded or assembled.
    """
    made = Engine(load(resolve(name), **options.given()), batch)
    atexit.register(made.close)
    return made
