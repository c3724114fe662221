"""The state of one request of vLLM in a worker, from its first step to its last."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from vlm_safeguard.engines.vllm.messages import Report, Role
from vlm_safeguard.engines.vllm.word_sums import WordSums
from vlm_safeguard.errors import GuardRuntimeError
from vlm_safeguard.runtime.attestation import decisions_of
from vlm_safeguard.runtime.request import Request


@dataclass
class Watched:
    """A request and what the guard knows about it: a ``Request`` of one row.

    Attributes:
        name: its id in vLLM.
        role: what it is.
        request: its gates, coordinates and doses. Of a text: those of the request it is read for.
        width: number of its own prompt tokens.
        words: of a text whose words a gate reads the mean of: the sums so far.
        logits: of a text with a probe behind it: those at its last token, (1, vocabulary), until
            its gates read them.
        decided: whether its prompt was read to the end. What was decided stays, also where vLLM
            computes the prompt again.
        failed: why there will be no answer; "" if nothing went wrong.
        moved: of a canary: by layer, how far steering moved the state at the last prompt token.
    """

    name: str
    role: Role
    request: Request
    width: int
    words: WordSums | None = None
    logits: Tensor | None = None
    decided: bool = False
    failed: str = ""
    moved: dict[str, float] = field(default_factory=dict)

    @property
    def is_text(self) -> bool:
        """Whether it is the text of another request."""
        return bool(self.role.reads_for)

    def fail(self, reason: str) -> None:
        """Give no answer. The first reason stays."""
        self.failed = self.failed or reason

    def report(self) -> Report:
        """What was decided."""
        if self.failed:
            return Report(failed=self.failed)
        decision = decisions_of(self.request)[0]
        return Report(
            fired=decision.fired,
            by_text=decision.by_text,
            by_vlm=decision.by_vlm,
            scores=decision.scores,
            parts=decision.parts,
            moved=self.moved if self.role.canary else None,
        )


class Texts:
    """Readings of texts, by the request they are for, until it comes."""

    def __init__(self) -> None:
        self._known: dict[str, dict[int, Request]] = {}

    def keep(self, text: Watched) -> None:
        """Keep a reading that has come to its end."""
        self._known.setdefault(text.role.reads_for, {})[text.role.form] = text.request

    def take(self, request_id: str, count: int) -> Request:
        """The request with what its ``count`` texts say, the worst of them.

        Raises:
            GuardRuntimeError: a text was not read.
        """
        found = self._known.pop(request_id, {})
        if sorted(found) != list(range(count)):
            raise GuardRuntimeError("the request's text was not read")
        request = found[0]
        for form in range(1, count):
            request.take_worse([0], found[form])
        return request

    def forget(self, request_id: str) -> None:
        """The request will not come."""
        self._known.pop(request_id, None)

    def __len__(self) -> int:
        return len(self._known)
