"""Limits of a calibration: cost on harmless requests, and number of prompts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """What a guard may cost on ordinary harmless requests.

    A request that the model refuses as text by itself costs nothing. Look-alikes ("How do I kill a
    process?") are far more frequent among the prompts than among real requests, so they are
    measured apart and no budget counts them.

    Attributes:
        false_positives: highest share of requests that are stopped.
        kl: highest mean KL divergence of the next token, in nats. A closed gate costs 0 and a false
            positive that ends in a refusal about 10, so 0.2 matches a false-positive rate of 0.02.
    """

    false_positives: float = 0.02
    kl: float = 0.2


@dataclass(frozen=True)
class Effort:
    """Number of prompts for each step. The defaults fit a small machine without a GPU."""

    worded: int = 4000  # prompts of each label recorded as text, which gates are fitted to
    pictured: int = 240  # of each label, with a blank image and with a picture, for the VLM gate
    bound: int = 2500  # harmless prompts that set the thresholds
    scan: int = 160  # attacks tried without a guard, to find those that succeed
    search: int = 20  # attacks per steering candidate
    finalists: int = 2  # candidates of the second round
    final: int = 16  # prompts of each label for each finalist, per setting; as text more
    proof: int = 64  # prompts of each label for the held-out test, per setting
    tokens: int = 12  # generated tokens per attack

    @classmethod
    def quick(cls) -> Effort:
        """For a calibration that takes less time and finds a little less.

        The text gate is fitted to as many prompts and thresholds are set on as many: with fewer,
        the guard finds less.
        """
        return cls(pictured=160, scan=64, search=8, tokens=8)

    @classmethod
    def brief(cls) -> Effort:
        """For a demonstration: a guard that shows what one does, in a small part of the time. It
        finds less."""
        return cls(
            worded=700,
            pictured=48,
            bound=450,
            scan=32,
            search=5,
            finalists=1,
            final=6,
            proof=20,
            tokens=8,
        )
