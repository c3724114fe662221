"""Answers an evaluation's requests in several processes of Ray."""

from __future__ import annotations

from dataclasses import dataclass

from vlm_safeguard.calibration.generation import Response, respond
from vlm_safeguard.data.inputs import Query
from vlm_safeguard.embedded.assemble import resolve
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.load_options import LoadOptions
from vlm_safeguard.model.loading import load


@dataclass(frozen=True)
class Batch:
    """Requests that are answered together: under one guard or none, ``tokens`` each at most."""

    queries: list[Query]
    guard: Guard | None
    tokens: int


class RespondWorker:
    """Answers batches as one process does.

    Args:
        model: a folder or hub name, or "embedded".
        options: how it is loaded.

    Raises:
        ModelError, DemoError: the model cannot be loaded or assembled.
    """

    def __init__(self, model: str, options: LoadOptions) -> None:
        self._loaded = load(resolve(model), **options.given())

    def work(self, part: Batch) -> list[Response]:
        """One response for each request."""
        return respond(
            self._loaded,
            part.queries,
            part.guard,
            max_new_tokens=part.tokens,
            batch=len(part.queries),
        )
