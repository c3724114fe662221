"""Reads the gates: scores states at the last prompt token and latches what they decide."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlm_safeguard import method
from vlm_safeguard.artifact.config import Gate
from vlm_safeguard.errors import GuardRuntimeError
from vlm_safeguard.runtime.request import Request


class GateReader:
    """The gates of one guard. ``tensors`` as in ``Guard``."""

    def __init__(self, gates: list[Gate], tensors: dict[str, Tensor]) -> None:
        self._gates = gates
        self._vectors = [tensors[f"gate.{index}"] for index in range(len(gates))]
        self._thresholds = [torch.tensor(gate.thresholds) for gate in gates]
        self._at: dict[tuple[str, int], list[tuple[int, int]]] = {}  # -> (gate, place) pairs
        for index, gate in enumerate(gates):
            for place, layer in enumerate(gate.layers):
                self._at.setdefault((gate.source, layer), []).append((index, place))

    def layers(self, source: str) -> frozenset[int]:
        """Layers that gates of a source read."""
        return frozenset(layer for kind, layer in self._at if kind == source)

    def read(self, request: Request, source: str, layer: int, states: Tensor) -> None:
        """Take a layer's states (B, d) at q. A gate is scored once it can be decided: layer by
        layer, or for all its layers when the last of them has come.

        Raises:
            GuardRuntimeError: a score is NaN or Inf, which blocks the request.
        """
        for index, place in self._at.get((source, layer), ()):
            if self._gates[index].per_layer:
                scores = self._score(index, states[:, None], slice(place, place + 1))
                request.latch(index, place, scores)
                continue
            held = request.states.setdefault(index, {})
            held[place] = states
            if len(held) == len(self._gates[index].layers):
                del request.states[index]
                stacked = torch.stack([held[n].to(states.device) for n in range(len(held))], 1)
                request.latch(index, None, self._score(index, stacked, slice(None)))

    def _score(self, index: int, states: Tensor, places: slice) -> list[list[float]]:
        """Scores, per row, of a gate's layers ``places``, from states (B, n, d)."""
        device = states.device
        if self._vectors[index].device != device:  # once: the last layer of a gate stays in place
            self._vectors[index] = self._vectors[index].to(device)
            self._thresholds[index] = self._thresholds[index].to(device)
        scores: list[list[float]] = method.gate_scores(
            states, self._vectors[index][places], self._thresholds[index][places]
        ).tolist()
        if not all(math.isfinite(score) for row in scores for score in row):
            raise GuardRuntimeError("the request is blocked: a gate score is NaN or Inf")
        return scores
