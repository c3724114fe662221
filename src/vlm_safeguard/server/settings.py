"""The server's mode and limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["enforce", "refuse", "monitor"]


@dataclass(frozen=True)
class Settings:
    """What the operator chooses. No request can change any of it.

    Attributes:
        model: name of the model in requests and responses.
        mode: ``enforce``: open gates steer the answer. ``refuse``: an open gate answers with
            ``refusal``, and nothing is generated. ``monitor``: gates are read, and nothing changes.
        refusal: the answer in mode ``refuse``.
        batch: requests that are answered together, at most.
        window: seconds that the first request of a batch waits for others.
        waiting: requests that may wait. One more gets status 429.
        max_waiting_pixels: pixels of all pictures that may wait, 3 bytes each; in a batch, of
            all that are decoded.
        deadline: seconds until a request that has not ended is given up, waiting included.
        max_tokens: tokens of an answer, at most; and where the request does not say.
        max_prompt_tokens: tokens of a prompt with its pictures, at most.
        max_characters: characters of all messages together.
        max_messages: messages of a request.
        max_images: pictures of a request.
        max_body: bytes of a request body.
        max_bodies: bytes of all bodies that are read or answered at once.
        body_seconds: seconds in which a body must arrive.
        check_every: seconds between two self-checks.
        api_keys: keys that may ask. None: everyone may, and is trusted.
        trusted_keys: keys that also see gate scores.
    """

    model: str
    mode: Mode = "enforce"
    refusal: str = "I can't help with that request."
    batch: int = 8
    window: float = 0.02
    waiting: int = 64
    max_waiting_pixels: int = 200_000_000
    deadline: float = 300.0
    max_tokens: int = 1024
    default_tokens: int = 256
    max_prompt_tokens: int = 4096
    max_characters: int = 100_000
    max_messages: int = 100
    max_images: int = 4
    max_body: int = 20_000_000
    max_bodies: int = 500_000_000
    body_seconds: float = 30.0
    check_every: float = 60.0
    api_keys: frozenset[str] = frozenset()
    trusted_keys: frozenset[str] = frozenset()

    @property
    def inside(self) -> int:
        """Requests that the server works on at once, at most, whether they wait or are read."""
        return self.waiting + 2 * self.batch + 16

    @property
    def open(self) -> bool:
        """Whether requests need no key."""
        return not self.api_keys and not self.trusted_keys
