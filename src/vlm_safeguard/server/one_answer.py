"""Follows the answer to one request token by token, and sends it piece by piece."""

from __future__ import annotations

import math
from typing import Any

from vlm_safeguard.runtime.attestation import Decision
from vlm_safeguard.server import http_errors
from vlm_safeguard.server.job import Begun, Done, Failed, GateVerdict, Job, Pictures, Text
from vlm_safeguard.server.settings import Settings
from vlm_safeguard.server.text_stream import TextStream


class OneAnswer:
    """The answer to ``job``.

    Args:
        job: the request.
        settings: the mode and the refusal.
        tokenizer: writes tokens as text.
    """

    def __init__(self, job: Job, settings: Settings, tokenizer: Any) -> None:
        self.job, self._settings = job, settings
        self._stream = TextStream(tokenizer, job.sampling.stop)
        self._tokens = 0

    def begin(self, decision: Decision | None, pictures: Pictures, prompt_tokens: int) -> None:
        """The prompt was read: tell what was decided, and end a request that needs no more.

        Args:
            decision: of the guard; None without one.
            pictures: counts of the request.
            prompt_tokens: with pictures.
        """
        job, verdict = self.job, _verdict(decision) if decision else None
        fired = verdict is not None and verdict.fired
        refused = self._settings.mode == "refuse" and fired and not job.gates_only
        job.send(Begun(verdict, pictures, prompt_tokens, refused))
        if job.gates_only:
            job.send(Done("stop", 0))
        elif refused:
            job.send(Text(self._settings.refusal))
            job.send(Done("content_filter", 0))

    def add(self, token: int, is_end: bool) -> None:
        """Take one more token; ``is_end``: it ends the answer and has no text."""
        job, stream = self.job, self._stream
        if job.unwanted:
            job.send(Failed(http_errors.too_late()))
            return
        self._tokens += 1
        if not is_end:
            self._say(stream.add(token))
        if is_end or stream.stopped or self._tokens >= job.sampling.max_tokens:
            self._say(stream.end())
            reason = "stop" if is_end or stream.stopped else "length"
            job.send(Done(reason, self._tokens))

    def _say(self, text: str) -> None:
        if text:
            self.job.send(Text(text))


def _verdict(decision: Decision) -> GateVerdict:
    scores = {
        name: [None if math.isnan(score) else score for score in row]
        for name, row in decision.scores.items()
    }
    return GateVerdict(decision.fired, decision.sources, scores)
