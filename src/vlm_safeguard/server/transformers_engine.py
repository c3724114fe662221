"""The inference thread of transformers: answers requests in batches through a guarded model.

The guard is attached once, for as long as the engine lives. Requests that arrive within a short
window are answered by one ``generate`` call, each with its own gate, sampling and stop sequences.
Others wait for the next window. Every failure ends a request without text, or stops its text.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from vlm_safeguard.errors import ModelError, PromptTooLong, UnreadableText
from vlm_safeguard.guard import Guard, reads_pictures
from vlm_safeguard.model.chat import prepare, takes_system
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.positions import room
from vlm_safeguard.runtime.session import Session
from vlm_safeguard.server import http_errors
from vlm_safeguard.server.batch_progress import BatchProgress
from vlm_safeguard.server.conversation import Takes
from vlm_safeguard.server.inference_thread import InferenceThread
from vlm_safeguard.server.job import Failed, Job
from vlm_safeguard.server.picture_count import count_pictures, marker_of
from vlm_safeguard.server.self_check import SelfCheck
from vlm_safeguard.server.settings import Settings
from vlm_safeguard.server.telemetry import Telemetry
from vlm_safeguard.server.token_sampling import RowSampling

logger = logging.getLogger(__name__)


class TransformersEngine(InferenceThread):
    """Answers ``Job``s in a thread of its own.

    Args:
        loaded: the model and its processor. The engine is their only user from now on.
        guard: the guard to attach. None runs the model unguarded, for measurements of its cost;
            the command line never does that.
        settings: mode and limits.
        telemetry: where counts go.
    """

    def __init__(
        self, loaded: LoadedModel, guard: Guard | None, settings: Settings, telemetry: Telemetry
    ) -> None:
        takes = Takes(takes_system(loaded.processor), reads_pictures(guard))
        super().__init__(settings, telemetry, takes)
        self.loaded, self.guard = loaded, guard
        self._marker = marker_of(loaded.processor)
        self._session: Session | None = None
        self._self_check: SelfCheck | None = None

    def _serve(self) -> None:
        guard, loaded = self.guard, self.loaded
        monitor = self.settings.mode == "monitor"
        self._self_check = check = SelfCheck(loaded, guard, monitor) if guard else None
        attached = guard.attach(loaded.model, loaded.processor, monitor) if guard else nullcontext()
        with attached as session:
            self._session = session
            if check and session:
                check.run(session)
            self._started()
            while not self._closing:
                self._taken = self._next()
                if self._taken:
                    self._answer(self._taken)
                self._taken = []
                if check and session and time.monotonic() > self._due:
                    self._check(partial(check.run, session))

    def _next(self) -> list[Job]:
        """Wait for a request, then for others that can share its batch."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing, self._pause())
            if not self._waiting or self._closing:
                return []
            self._changed.wait_for(
                lambda: len(self._waiting) >= self.settings.batch or self._closing,
                self.settings.window,
            )
            self._drop_unwanted()
            if not self._waiting:
                return []
            kind = self._waiting[0].pictured, self._waiting[0].gates_only
            taken: list[Job] = []
            left: deque[Job] = deque()
            for job in self._waiting:
                if len(taken) < self.settings.batch and (job.pictured, job.gates_only) == kind:
                    taken.append(job)
                else:
                    left.append(job)
            self._waiting = left
            self.telemetry.queue.set(len(left))
        return taken

    def _answer(self, jobs: list[Job]) -> None:
        """Answer a batch. If it fails, each half of the requests of which no text is out is tried
        by itself, so that a bad request costs the others little."""
        try:
            self._generate(jobs)
            return
        except http_errors.RequestError as error:
            failure = error
        except UnreadableText:
            failure = http_errors.unreadable()
        except PromptTooLong as error:
            failure = http_errors.no_room(error)
        except Exception as error:
            failure = http_errors.failed()
            # Without the message: it may quote the request.
            logger.error("a batch failed", extra={"error": type(error).__name__})
            if self._self_check and self._session:  # before anything else is answered
                self._check(partial(self._self_check.run, self._session))
        if failure.status >= 500:
            self.telemetry.failures.inc()
        fresh = [job for job in jobs if not job.begun and not job.ended]
        for half in (fresh[::2], fresh[1::2]) if len(jobs) > 1 else ():
            wanted = [job for job in half if not job.unwanted]
            if wanted and self.ready.is_set():
                self._answer(wanted)
        for job in jobs:
            job.send(Failed(http_errors.too_late() if job.unwanted else failure))

    @torch.inference_mode()
    def _generate(self, jobs: list[Job]) -> None:
        loaded, settings = self.loaded, self.settings
        conversations = [job.conversation.messages for job in jobs]
        inputs = self._prepare(conversations)
        lengths = inputs["attention_mask"].sum(1).tolist()
        most = settings.max_prompt_tokens
        if max(lengths) > most:
            for job, length in zip(jobs, lengths, strict=True):
                if length > most:
                    job.send(Failed(http_errors.too_long(length, most)))
            fit = [job for job in jobs if not job.ended]
            if fit:
                self._generate(fit)
            return
        pictures = count_pictures(loaded, self._marker, jobs, inputs)
        positions = room(loaded.model)
        for job, length in zip(jobs, lengths, strict=True):
            if positions is not None:
                job.fit(positions - length + 1)  # the last token takes none
        sampling = RowSampling([job.sampling for job in jobs])
        progress = BatchProgress(
            jobs, self._session, settings, loaded, pictures, lengths, sampling.broken
        )
        longest_answer = max(1 if job.gates_only else job.sampling.max_tokens for job in jobs)
        loaded.model.generate(
            **{key: value.to(loaded.device) for key, value in inputs.items()},
            max_new_tokens=longest_answer,
            do_sample=False,
            logits_processor=[sampling],
            stopping_criteria=[progress],
        )
        progress.finish()
        if sampling.broken:
            logger.error("logits were not finite", extra={"rows": len(sampling.broken)})
            self.telemetry.failures.inc()
            self._due = time.monotonic()

    def _prepare(self, conversations: list[Any]) -> dict[str, torch.Tensor]:
        try:
            return prepare(self.loaded.processor, conversations, self.takes.words, "left")
        except ModelError:  # their texts quote the request and the library
            raise http_errors.unusable() from None
