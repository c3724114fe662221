"""One request on its way through the inference thread, and the events that it gives back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from vlm_safeguard.server.conversation import Conversation
from vlm_safeguard.server.http_errors import RequestError


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one answer are chosen. ``temperature`` 0 takes the most likely token.

    ``by_default``: the request does not say how many tokens it wants. Its answer then ends where
    the model has no more positions.
    """

    max_tokens: int
    by_default: bool = False
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pictures:
    """How many pictures a request held, how many reached the model, and in how many the guard read
    the words."""

    sent: int
    reached: int
    read: int


@dataclass(frozen=True)
class GateVerdict:
    """What the guard decided about one request.

    Attributes:
        fired: whether a gate opened.
        gates: the sources of the gates that opened: "text", "vlm".
        scores: for each gate, one score, or with ``per_layer`` one for each layer; None if it was
            not read. A gate opens above 0.
    """

    fired: bool
    gates: tuple[str, ...]
    scores: dict[str, list[float | None]]


@dataclass(frozen=True)
class Begun:
    """The prompt was read and the gates are decided. Comes before any text."""

    verdict: GateVerdict | None
    pictures: Pictures
    prompt_tokens: int
    refused: bool = False


@dataclass(frozen=True)
class Text:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True)
class Done:
    """The answer is complete."""

    finish_reason: str
    completion_tokens: int


@dataclass(frozen=True)
class Failed:
    """There is no answer, or no more of it."""

    error: RequestError


Event = Begun | Text | Done | Failed


@dataclass(eq=False)
class Job:
    """A request in the engine. ``emit`` is called from the inference thread.

    ``gates_only``: the request ends when the gates are decided, and nothing is generated.
    """

    conversation: Conversation
    sampling: Sampling
    deadline: float  # of time.monotonic()
    emit: Callable[[Event], None]
    gates_only: bool = False
    begun: bool = False
    ended: bool = False
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def pictured(self) -> bool:
        return self.conversation.pictures > 0

    @property
    def unwanted(self) -> bool:
        """Nobody waits for it any more, or its time is up."""
        return self.cancelled.is_set() or time.monotonic() > self.deadline

    def fit(self, room: int) -> None:
        """Shorten an answer of default length to the positions that are left behind the prompt."""
        if self.sampling.by_default and self.sampling.max_tokens > room > 0:
            self.sampling = replace(self.sampling, max_tokens=room)

    def send(self, event: Any) -> None:
        """Hand over an event. Nothing follows the end."""
        if self.ended:
            return
        self.begun = self.begun or isinstance(event, Begun)
        self.ended = isinstance(event, Done | Failed)
        self.emit(event)
