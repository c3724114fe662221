"""One request between HTTP and the inference thread: events in order, the audit entry, metrics."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from vlm_safeguard.server import http_errors
from vlm_safeguard.server.audit import AuditLog, digest
from vlm_safeguard.server.conversation import Conversation
from vlm_safeguard.server.http_errors import RequestError
from vlm_safeguard.server.inference_thread import InferenceThread
from vlm_safeguard.server.job import Begun, Done, Event, Failed, Job, Sampling, Text

GRACE = 5.0  # seconds after the deadline in which the inference thread says that it has passed


class Exchange:
    """Submits a request and reads its events.

    Args:
        engine: the inference thread.
        conversation: messages and pictures.
        sampling: how tokens are chosen.
        endpoint: for metrics and the audit log.
        request_id: for the audit log.
        audit: the audit log, if one is kept.
        asked: digest of the request body.
        gates_only: only the gates are read.
    """

    def __init__(
        self,
        engine: InferenceThread,
        conversation: Conversation,
        sampling: Sampling,
        *,
        endpoint: str,
        request_id: str,
        audit: AuditLog | None,
        asked: str,
        gates_only: bool = False,
    ) -> None:
        self._engine, self._audit = engine, audit
        self._endpoint, self._id, self._asked = endpoint, request_id, asked
        self._conversation = conversation
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._start = time.monotonic()
        self._said: list[str] = []
        self._outcome = "cancelled"  # until an end says otherwise
        self._closed = False
        self.begun: Begun | None = None
        self.done: Done | None = None
        loop = asyncio.get_running_loop()

        def emit(event: Event) -> None:
            with suppress(RuntimeError):  # the loop was closed: nobody listens any more
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        deadline = self._start + engine.settings.deadline
        self._deadline = deadline + GRACE
        self._job = Job(conversation, sampling, deadline, emit, gates_only)

    async def begin(self) -> Begun:
        """Submit the request and wait until its gates are decided.

        Raises:
            RequestError: it is not answered.
        """
        try:
            self._engine.submit(self._job)
        except RequestError as error:
            self._fail(error)
            raise
        event = await self._next()
        if not isinstance(event, Begun):
            raise self._fail(http_errors.failed())
        self.begun = event
        return event

    async def texts(self) -> AsyncIterator[str]:
        """The pieces of the answer. After the last, ``done`` is set and the audit entry written.

        Raises:
            RequestError: the answer is not complete.
        """
        while not isinstance(event := await self._next(), Done):
            if not isinstance(event, Text):
                raise self._fail(http_errors.failed())
            if not self._said:
                self._engine.telemetry.first_text.observe(time.monotonic() - self._start)
            self._said.append(event.text)
            yield event.text
        self.done = event
        self._outcome = "refused" if self.begun and self.begun.refused else "answered"
        self.close()

    async def _next(self) -> Event:
        try:
            left = self._deadline - time.monotonic()
            event = await asyncio.wait_for(self._events.get(), max(0.0, left))
        except TimeoutError:
            raise self._fail(http_errors.too_late()) from None
        if isinstance(event, Failed):
            raise self._fail(event.error)
        return event

    def _fail(self, error: RequestError) -> RequestError:
        self._outcome = {429: "rejected", 504: "late", 400: "rejected"}.get(error.status, "failed")
        self.abandon()
        return error

    def abandon(self) -> None:
        """End a request that gets no whole answer. Does nothing after its end."""
        with suppress(RequestError):  # it fails already
            self.close()

    def close(self) -> None:
        """End the request, whether it is complete or its client left, and write the audit entry.

        Raises:
            RequestError: the audit log cannot be written.
        """
        if self._closed:
            return
        self._closed = True
        self._job.cancelled.set()
        try:
            if self._audit is not None:
                self._audit.write(self._entry())
        except OSError:
            self._outcome = "failed"
            raise RequestError(
                503, "the audit log cannot be written, and nothing is answered", "not_ready"
            ) from None
        finally:
            self._count()

    def _count(self) -> None:
        told = self._engine.telemetry
        told.requests.labels(self._endpoint, self._outcome, self._engine.settings.mode).inc()
        told.seconds.observe(time.monotonic() - self._start)
        if self.begun:
            told.pictures.inc(self.begun.pictures.reached)
            told.tokens.labels("prompt").inc(self.begun.prompt_tokens)
            for gate in self.begun.verdict.gates if self.begun.verdict else ():
                told.gates.labels(gate).inc()
        if self.done:
            told.tokens.labels("completion").inc(self.done.completion_tokens)

    def _entry(self) -> dict[str, Any]:
        answer = "".join(self._said)
        verdict = self.begun.verdict if self.begun else None
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "id": self._id,
            "endpoint": self._endpoint,
            "mode": self._engine.settings.mode,
            "outcome": self._outcome,
            "fired": verdict.fired if verdict else None,
            "gates": list(verdict.gates) if verdict else [],
            "scores": verdict.scores if verdict else {},
            "pictures": self._conversation.pictures,
            "pictures_reached": self.begun.pictures.reached if self.begun else None,
            "words_read": self._conversation.read,
            "prompt_tokens": self.begun.prompt_tokens if self.begun else None,
            "completion_tokens": self.done.completion_tokens if self.done else 0,
            "seconds": round(time.monotonic() - self._start, 3),
            "request_sha256": self._asked,
            "answer_sha256": digest(answer),
        }
        if self._audit is not None and self._audit.content:
            entry["messages"] = _texts(self._conversation)
            entry["answer"] = answer
        return entry


def _texts(conversation: Conversation) -> list[dict[str, str]]:
    """Messages as text, ``[image]`` in place of each picture."""
    told = []
    for message in conversation.messages:
        content = message["content"]
        if not isinstance(content, str):
            content = "".join(part.get("text", "[image]") for part in content)
        told.append({"role": message["role"], "content": content})
    return told


def new_id(prefix: str) -> str:
    """A new identifier."""
    return f"{prefix}-{uuid.uuid4().hex}"
