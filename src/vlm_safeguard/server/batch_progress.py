"""Follows a batch token by token: sends text, and ends each row by itself."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from vlm_safeguard.errors import GuardRuntimeError
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.runtime.attestation import Decision
from vlm_safeguard.server import http_errors
from vlm_safeguard.server.job import Failed, Job, Pictures
from vlm_safeguard.server.one_answer import OneAnswer
from vlm_safeguard.server.settings import Settings


class BatchProgress(StoppingCriteria):
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
        self._jobs, self._session = jobs, session
        self._pictures, self._lengths, self._broken = pictures, lengths, broken
        tokenizer = loaded.processor.tokenizer
        self._rows = [OneAnswer(job, settings, tokenizer) for job in jobs]
        self._ends = _end_tokens(loaded)
        self._tokens = 0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Whether each row (B,) has ended."""
        self._check_passes()
        for row in self._broken:
            self._jobs[row].send(Failed(http_errors.failed()))
        if self._tokens == 0:
            self._begin()
        self._tokens += 1
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if not self._jobs[row].ended:
                self._rows[row].add(token, token in self._ends)
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
        """The prompts were read: tell the verdicts, and end requests that need no more."""
        for row, (answer, decision) in enumerate(zip(self._rows, self._decisions(), strict=True)):
            answer.begin(decision, self._pictures[row], self._lengths[row])

    def _decisions(self) -> Sequence[Decision | None]:
        if self._session is None:
            return [None] * len(self._jobs)
        decisions: list[Decision] = self._session.decisions
        if len(decisions) != len(self._jobs):
            raise GuardRuntimeError("the guard did not decide about every request")
        return decisions


def _end_tokens(loaded: LoadedModel) -> set[int]:
    ends = loaded.model.generation_config.eos_token_id
    if ends is None:
        ends = loaded.processor.tokenizer.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends}
