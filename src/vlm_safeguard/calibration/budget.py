"""Limits of a calibration: cost on harmless requests, and number of prompts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """What a guard may cost on harmless requests."""

    # The thresholds are set so that no more of harmless requests are stopped that the model, asked
    # as text, would answer; the proof allows no more for all on which a gate opens.
    false_positives: float = 0.02
    # Nats, next token at q, mean over harmless requests. A closed gate costs nothing, a false
    # positive that ends in a refusal about ten: this is the same budget in other units.
    kl: float = 0.2


@dataclass(frozen=True)
class Effort:
    """How many prompts each step looks at; the defaults fit a small CPU machine."""

    worded: int = 1000  # prompts of each label recorded as text, for the witness
    pictured: int = 240  # of each label with a blank image and with a picture, for the gate
    bound: int = 1200  # harmless prompts that set the thresholds
    scan: int = 160  # attacks among which those are looked for that succeed unguarded
    search: int = 20  # attacks per steering candidate
    finalists: int = 2  # candidates of the second round
    final: int = 16  # prompts of each label for each finalist, per setting
    proof: int = 64  # prompts of each label for the proof, per setting
    tokens: int = 12  # generated tokens per attack
