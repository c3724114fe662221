"""Answers a batch in this process, or parts of it in workers of Ray."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vlm_safeguard.engines.ray_pool import RayPool
from vlm_safeguard.engines.vllm.messages import guard_digest
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.load_options import LoadOptions
from vlm_safeguard.server.audit import digest
from vlm_safeguard.server.batch import answer_all
from vlm_safeguard.server.batch_file import Task
from vlm_safeguard.server.settings import Settings
from vlm_safeguard.server.start import Kind, start_engine

PART = 4  # times the batch: requests that a worker of Ray takes together


@dataclass(frozen=True)
class BatchRun:
    """What answers a batch.

    Attributes:
        model: a folder or hub name, or "embedded".
        guard: the same.
        settings: mode and limits.
        options: how the model is loaded.
    """

    model: str
    guard: str
    settings: Settings
    options: LoadOptions

    @property
    def identity(self) -> str:
        """SHA-256 of the guard, which belongs to one model, and of what else changes answers.

        Raises:
            GuardError: the guard cannot be loaded.
        """
        chosen = self.settings
        facts = [guard_digest(Guard.from_pretrained(self.guard)), chosen.model, chosen.mode]
        limits = [chosen.refusal, chosen.max_tokens, chosen.max_prompt_tokens]
        return digest(json.dumps([*facts, *limits]))

    def answer(
        self,
        tasks: Sequence[Task],
        kind: Kind | Literal["ray"],
        workers: int,
        put: Callable[[dict[str, Any]], None],
        say: Callable[[str], None],
    ) -> None:
        """Answer requests.

        Args:
            tasks: the requests.
            kind: what runs the model; "ray": transformers in ``workers`` processes.
            workers: of Ray.
            put: gets each answer, in OpenAI's form, in the order in which they come.
            say: takes what is being done.

        Raises:
            SafeguardError: see ``start_engine``, ``answer_all`` and ``RayPool``.
        """
        if kind != "ray":
            engine = start_engine(kind, self.model, self.guard, self.options, self.settings, say)
            try:
                answer_all(engine, tasks, put)
            finally:
                engine.close()
            return
        say(f"starting {workers} workers")
        pool: RayPool[list[Task], list[dict[str, Any]]]
        pool = RayPool(BatchWorker, (self, self.identity), workers)
        step = PART * self.settings.batch
        try:
            for part in pool.map(list(tasks[n : n + step]) for n in range(0, len(tasks), step)):
                for answer in part:
                    put(answer)
        finally:
            pool.close()


class BatchWorker:
    """Answers parts of a batch in a process of its own.

    Args:
        run: what answers it.
        identity: of the run, where it was begun.

    Raises:
        SafeguardError: see ``start_engine``; or this machine has another guard.
    """

    def __init__(self, run: BatchRun, identity: str) -> None:
        if run.identity != identity:
            raise SafeguardError(f"the guard {run.guard} is another one on a worker's machine")
        self._engine = start_engine(
            "transformers", run.model, run.guard, run.options, run.settings, lambda _: None
        )

    def work(self, part: list[Task]) -> list[dict[str, Any]]:
        """The answers to some requests, in the order in which they came."""
        found: list[dict[str, Any]] = []
        answer_all(self._engine, part, found.append)
        return found
