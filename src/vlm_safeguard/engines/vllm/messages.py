"""What front end, engine core and workers tell each other about a request.

All of it is plain data: it travels in ``SamplingParams.extra_args`` on the way in, and beside the
sampled tokens on the way out.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from typing import Any

from vlm_safeguard.errors import GuardRuntimeError
from vlm_safeguard.guard import Guard
from vlm_safeguard.runtime.attestation import Decision

KEY = "vlm_safeguard"
REPORT = "vlm_safeguard_report"  # attribute of a ModelRunnerOutput: a Report for each request


@dataclass(frozen=True)
class Order:
    """From the front end: how a request is to be guarded.

    Attributes:
        guard: digest of the guard.
        texts: token ids of the request as text, of its canonical form if that differs, and if the
            guard reads sentences of the last turn and each of its sentences, all with the guard's
            probe behind them; none if the guard reads no text.
        judged: the places of the texts that have a verdict, see ``runtime.gate.refusal_signs``.
        wordless: whether the text says nothing, so that text gates stay shut.
        canary: whether to report how far steering moved the states (the self-check).
        uncached: whether texts take no states from the prefix cache, because a gate reads the mean
            of all.
    """

    guard: str
    texts: list[list[int]]
    judged: list[int] = field(default_factory=list)
    wordless: bool = False
    canary: bool = False
    uncached: bool = False


@dataclass(frozen=True)
class Role:
    """To the workers: what a request in the batch is.

    Attributes:
        guard: digest of the guard.
        reads_for: the request whose text this one is; "" for a request of a user.
        form: of a text: its place in ``Order.texts``. Of a user's request: the number of texts.
        width: of a text: the number of prompt tokens of the request it is read for.
        judged: of a text: whether it has a verdict. Not read of others.
        wordless, canary: as in ``Order``.
    """

    guard: str
    reads_for: str
    form: int
    width: int
    judged: bool
    wordless: bool
    canary: bool


@dataclass(frozen=True)
class Report:
    """From the workers, once for each request: what was decided, or why it failed.

    Attributes:
        failed: the reason why there is no answer; "" if there is one. Never quotes the request.
        fired, by_text, by_vlm, scores, parts: as in ``Decision``.
        moved: of a canary: by layer, how far steering moved the state.
    """

    failed: str = ""
    fired: bool = False
    by_text: bool = False
    by_vlm: bool = False
    scores: dict[str, list[float]] | None = None
    parts: dict[str, list[float]] | None = None
    moved: dict[str, float] | None = None

    @property
    def decision(self) -> Decision:
        """What the guard decided."""
        scores, parts = self.scores or {}, self.parts or {}
        return Decision(self.fired, self.by_text, self.by_vlm, scores, parts)


def put(params: Any, message: Order | Role) -> None:
    """Write a message into sampling parameters."""
    params.extra_args = {**(params.extra_args or {}), KEY: asdict(message)}


def order_of(params: Any) -> Order:
    """The order in sampling parameters.

    Raises:
        GuardRuntimeError: there is none: the request did not go through a guarded front end.
    """
    return Order(**_found(params))


def role_of(params: Any) -> Role:
    """The role in sampling parameters.

    Raises:
        GuardRuntimeError: there is none: the request did not go through a guarded engine core.
    """
    return Role(**_found(params))


def _found(params: Any) -> dict[str, Any]:
    found = (getattr(params, "extra_args", None) or {}).get(KEY)
    if not isinstance(found, dict):
        raise GuardRuntimeError(
            "a request came without the guard's order: the guard is not armed in every process of "
            "vLLM. Set VLM_SAFEGUARD for all of them, and let VLLM_PLUGINS name vlm_safeguard"
        )
    return found


def guard_digest(guard: Guard) -> str:
    """SHA-256 of a guard's settings, the digest of its tensors among them."""
    return hashlib.sha256(guard.config.model_dump_json().encode()).hexdigest()
