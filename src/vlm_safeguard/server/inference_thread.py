"""Base class of inference threads: queue, self-checks, shutdown.

``transformers_engine`` runs a model of transformers in it, ``vllm_engine`` vLLM.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable

from vlm_safeguard.server import http_errors
from vlm_safeguard.server.conversation import Takes
from vlm_safeguard.server.job import Failed, Job
from vlm_safeguard.server.settings import Settings
from vlm_safeguard.server.telemetry import Telemetry

logger = logging.getLogger(__name__)
_STUCK = 60.0  # seconds that a self-check may take, beside its deadline


class InferenceThread(ABC):
    """Answers ``Job``s in a thread of its own.

    Args:
        settings: mode and limits.
        telemetry: where counts go.
        takes: what model and guard make of messages.

    ``ready`` is set while the guard passes its self-check.
    """

    def __init__(self, settings: Settings, telemetry: Telemetry, takes: Takes) -> None:
        self.settings, self.telemetry, self.takes = settings, telemetry, takes
        self.ready = threading.Event()
        self._waiting: deque[Job] = deque()
        self._taken: list[Job] = []
        self._changed = threading.Condition()
        self._closing = False
        self._due = 0.0  # of the next self-check
        self._settled = threading.Event()  # the start has succeeded or failed
        self._start_error: BaseException | None = None
        self._thread = threading.Thread(target=self._live, name="inference", daemon=True)

    # -- from other threads ----------------------------------------------------------------------

    def start(self) -> None:
        """Put the guard to work and run the first self-check.

        Raises:
            SafeguardError: the guard cannot work, or fails the check.
        """
        self._thread.start()
        self._settled.wait()
        if self._start_error is not None:
            raise self._start_error

    @property
    def alive(self) -> bool:
        """Whether the inference thread runs, and is not stuck: a batch ends by its deadline, and
        the self-check that is due follows it."""
        latest = self._due + self.settings.deadline + _STUCK
        return self._thread.is_alive() and time.monotonic() < latest

    @property
    def waiting(self) -> int:
        """Requests that wait for the model."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether requests are being answered."""
        return bool(self._taken)

    def check_room(self) -> None:
        """Whether one more request may come.

        Raises:
            RequestError: the guard is not ready, the engine shuts down, or the queue is full.
        """
        with self._changed:
            if self._closing or not self.alive or not self.ready.is_set():
                raise http_errors.not_ready()
            self._drop_unwanted()
            if len(self._waiting) >= self.settings.waiting:
                raise http_errors.too_busy(5)

    def submit(self, job: Job) -> None:
        """Queue a request.

        Raises:
            RequestError: see ``check_room``; or there are too many pixels in the queue.
        """
        with self._changed:
            self.check_room()
            pixels = sum(one.conversation.pixels for one in (*self._waiting, job))
            if self._waiting and pixels > self.settings.max_waiting_pixels:
                raise http_errors.too_busy(5)
            self._waiting.append(job)
            self.telemetry.queue.set(len(self._waiting))
            self._changed.notify_all()

    def _drop_unwanted(self) -> None:
        """Drop what waits in vain. Called under the lock."""
        for job in self._waiting:
            if job.unwanted:
                job.send(Failed(http_errors.too_late()))
        self._waiting = deque(job for job in self._waiting if not job.ended)
        self.telemetry.queue.set(len(self._waiting))

    def close(self) -> None:
        """Finish what was begun, fail what waits, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    # -- the inference thread --------------------------------------------------------------------

    def _live(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            if not self.ready.is_set():
                self._start_error = error
            logger.error("the inference thread ended", extra={"error": type(error).__name__})
        finally:
            with self._changed:  # no request is queued behind the last look at the queue
                self._closing = True
                self.ready.clear()
                lost, self._waiting = list(self._waiting), deque()
            for job in (*self._taken, *lost):
                job.send(Failed(http_errors.not_ready()))
            self._taken = []
            self._settled.set()

    @abstractmethod
    def _serve(self) -> None:
        """Check the guard, call ``_started``, and answer jobs from ``_waiting`` until ``_closing``.

        Jobs that were taken from the queue stand in ``_taken`` until they have ended.
        """

    def _started(self) -> None:
        """The first self-check was passed: let requests in."""
        self._due = time.monotonic() + self.settings.check_every
        self.ready.set()
        self._settled.set()

    def _pause(self) -> float:
        """Seconds until the next self-check."""
        return max(0.0, self._due - time.monotonic())

    def _check(self, check: Callable[[], None]) -> None:
        """Run a self-check. Nothing is accepted while it fails."""
        self._due = time.monotonic() + self.settings.check_every
        try:
            check()
        except Exception as error:
            self.ready.clear()
            self._due = time.monotonic() + min(5.0, self.settings.check_every)
            with self._changed:
                lost, self._waiting = list(self._waiting), deque()
            for job in lost:
                job.send(Failed(http_errors.not_ready()))
            logger.error("self-check failed", extra={"error": type(error).__name__})
            self.telemetry.self_check_failures.inc()
        else:
            self.ready.set()
