"""Follows a batch token by token: sends text, and ends each row by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from vlm_safeguard.errors import GuardRuntimeError
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.runtime.attestation import Decision
from vlm_safeguard.server import errors
from vlm_safeguard.server.job import Begun, Done, Failed, Job, Pictures, Text, Verdict
from vlm_safeguard.server.settings import Settings
from vlm_safeguard.server.text_stream import TextStream


class Answers(StoppingCriteria):
    """``generate`` calls it after every token. It says which rows have ended.

    Args:
        jobs: the requests, in batch order.
        session: the attached guard; None without one.
        settings: the mode and the refusal.
        loaded: the model, for its end tokens, and the tokenizer.
        pictures: counts of each request.
        lengths: prompt tokens of each request.
        broken: rows whose logits are not finite, which ``RowSampling`` finds.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        session: Any,
        settings: Settings,
        loaded: LoadedModel,
        pictures: Sequence[Pictures],
        lengths: Sequence[int],
        broken: Set[int],
    ) -> None:
        self._jobs, self._session, self._settings = jobs, session, settings
        self._pictures, self._lengths, self._broken = pictures, lengths, broken
        tokenizer = loaded.processor.tokenizer
        self._streams = [TextStream(tokenizer, job.sampling.stop) for job in jobs]
        self._ends = _end_tokens(loaded)
        self._tokens = 0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Whether each row (B,) has ended."""
        self._check_passes()
        for row in self._broken:
            self._jobs[row].send(Failed(errors.failed()))
        if self._tokens == 0:
            self._begin()
        self._tokens += 1
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if not self._jobs[row].ended:
                self._add(row, token)
        return torch.tensor([job.ended for job in self._jobs], device=input_ids.device)

    def finish(self) -> None:
        """Check that every request got its end."""
        if not all(job.ended for job in self._jobs):
            raise GuardRuntimeError("generation ended before its answers")

    def _check_passes(self) -> None:
        """A token is served only if a forward call under guard, and no other, made it."""
        if self._session is not None and self._session.passes != self._tokens + 1:
            raise GuardRuntimeError("a token was not made under guard")

    def _begin(self) -> None:
        """The prompt was read: tell the verdicts, and end requests that need no more."""
        refuse = self._settings.mode == "refuse"
        for row, (job, verdict) in enumerate(zip(self._jobs, self._verdicts(), strict=True)):
            refused = refuse and verdict is not None and verdict.fired and not job.gates_only
            job.send(Begun(verdict, self._pictures[row], self._lengths[row], refused))
            if job.gates_only:
                job.send(Done("stop", 0))
            elif refused:
                job.send(Text(self._settings.refusal))
                job.send(Done("content_filter", 0))

    def _verdicts(self) -> list[Verdict | None]:
        if self._session is None:
            return [None] * len(self._jobs)
        decisions = self._session.decisions
        if len(decisions) != len(self._jobs):
            raise GuardRuntimeError("the guard did not decide about every request")
        return [_verdict(decision) for decision in decisions]

    def _add(self, row: int, token: int) -> None:
        job, stream = self._jobs[row], self._streams[row]
        if job.unwanted:
            job.send(Failed(errors.too_late()))
            return
        ended = token in self._ends
        if not ended:
            self._say(job, stream.add(token))
        if ended or stream.stopped or self._tokens >= job.sampling.max_tokens:
            self._say(job, stream.end())
            reason = "stop" if ended or stream.stopped else "length"
            job.send(Done(reason, self._tokens))

    @staticmethod
    def _say(job: Job, text: str) -> None:
        if text:
            job.send(Text(text))


def _verdict(decision: Decision) -> Verdict:
    scores = {
        name: [None if math.isnan(score) else score for score in row]
        for name, row in decision.scores.items()
    }
    return Verdict(decision.fired, decision.sources, scores)


def _end_tokens(loaded: LoadedModel) -> set[int]:
    ends = loaded.model.generation_config.eos_token_id
    if ends is None:
        ends = loaded.processor.tokenizer.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends}
