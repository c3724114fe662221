"""Gates: score hidden states at the last prompt token and keep the decision for each row.

A kind of gate is a class in ``GATES``. Attached guards, calibration, the doctor and the studies use
the same classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vlm_safeguard import method
from vlm_safeguard.artifact.config import Gate
from vlm_safeguard.errors import GuardError, GuardRuntimeError
from vlm_safeguard.runtime.request import Request


class LinearGate:
    """``s_l = h_l(q) . v_l - b_l``: one vector and one threshold per layer.

    With ``reads_mean``, h_l(q) is followed by the mean of h_l over the words, and with
    ``reads_probe`` by the state at the end of the probe (``model.words.readings``).

    Attributes:
        reads_logits: whether the logits of the first answer token add to the score (``refusal``).
            Only a gate that reads the text-only pass, all layers together, can have them.
    """

    reads_logits = False

    def __init__(self, vectors: Tensor, thresholds: Tensor) -> None:
        """``vectors``: (n, d), or (n, k d) where k states are read. ``thresholds``: (n,)."""
        self.vectors, self.thresholds = vectors, thresholds

    @classmethod
    def make(cls, gate: Gate, vectors: Tensor) -> LinearGate:
        """The scorer of a guard's gate."""
        return cls(vectors, torch.tensor(gate.thresholds))

    def scores(self, states: Tensor, places: slice = slice(None)) -> Tensor:
        """Scores (B, n) of states (B, n, d) at the gate's layers ``places``, one per layer. Without
        ``per_layer``, the gate's score is their sum.

        States with others behind them, (B, n, k d), serve gates that read fewer too.
        """
        if self.vectors.device != states.device:  # once: the last layer of a gate stays in place
            self.vectors = self.vectors.to(states.device)
            self.thresholds = self.thresholds.to(states.device)
        seen = states[..., : self.vectors.shape[1]]
        return method.gate_scores(seen, self.vectors[places], self.thresholds[places])

    def total(self, states: Tensor, signs: Tensor | None = None) -> Tensor:
        """Scores (B,) of states (B, n, d) at all layers of a gate without ``per_layer``.

        Args:
            signs: refusal signs (B, 2), for a gate that reads them.
        """
        return self.summed(self.scores(states), signs)

    def summed(self, scores: Tensor, signs: Tensor | None = None) -> Tensor:
        """The ``total`` (B,), of the scores (B, n) at all layers."""
        return scores.sum(1)

    def needs_logits(self, any_judged: bool) -> bool:
        """Whether logits may add to the score; ``any_judged``: whether any text has a verdict, see
        ``refusal_signs``. Where they do not, the pass ends below the head."""
        return self.reads_logits

    def refusal(self, logits: Tensor, judged: Tensor) -> Tensor:
        """What the logits (B, vocabulary) of the first answer token add to the score, (B,).

        Called only if the gate ``needs_logits``.

        Args:
            judged: as in ``refusal_signs``.
        """
        raise NotImplementedError(f"{type(self).__name__} reads logits and does not say how")

    def refuses(self, logits: Tensor, judged: Tensor) -> list[bool]:
        """Whether the LLM would refuse each text, for steering with reference "verdict". A gate
        that has no verdict says no.

        Args: as in ``refusal``.
        """
        return [False] * len(logits)


class IntentGate(LinearGate):
    """A linear score plus signs that the LLM itself would refuse, weighted: ``refusal_signs``."""

    reads_logits = True

    def __init__(
        self, vectors: Tensor, thresholds: Tensor, openings: Tensor, weights: Tensor
    ) -> None:
        """``openings``: token ids, (k,). ``weights``: of the two signs, (2,)."""
        super().__init__(vectors, thresholds)
        self.openings, self.weights = openings, weights

    @classmethod
    def make(cls, gate: Gate, vectors: Tensor) -> IntentGate:
        thresholds, openings = torch.tensor(gate.thresholds), torch.tensor(gate.openings)
        weights = torch.tensor([gate.intent_weight, gate.verdict_weight])
        return cls(vectors, thresholds, openings, weights)

    def summed(self, scores: Tensor, signs: Tensor | None = None) -> Tensor:
        if signs is None:
            raise ValueError("this gate reads the refusal intent too")
        return super().summed(scores) + signs @ self.weights

    def needs_logits(self, any_judged: bool) -> bool:
        return any_judged or float(self.weights[0]) > 0

    def refusal(self, logits: Tensor, judged: Tensor) -> Tensor:
        signs = refusal_signs(logits, self.openings.to(logits.device), judged)
        return signs @ self.weights.to(logits.device)

    def refuses(self, logits: Tensor, judged: Tensor) -> list[bool]:
        signs = refusal_signs(logits, self.openings.to(logits.device), judged)
        said: list[bool] = signs[:, 1].bool().tolist()
        return said


def refusal_signs(logits: Tensor, openings: Tensor, judged: Tensor | None = None) -> Tensor:
    """Refusal intent and verdict (``method``) as two columns, (B, 2).

    Args:
        logits: of the first token of the answer to the text alone, (B, vocabulary).
        openings: token ids, (k,).
        judged: which texts have a verdict, (B,); None for all. The others get 0. A single sentence
            of a request has none, because a model declines to answer many sentences that are no
            request; nor has a text that is written in odd characters, beside its canonical form.
    """
    intent = method.refusal_intent(logits, openings)
    verdict = method.refusal_verdict(logits, openings)
    if judged is not None:
        verdict = verdict * judged.to(verdict)
    return torch.stack([intent, verdict], 1)


GATES: dict[str, type[LinearGate]] = {"linear": LinearGate, "intent": IntentGate}


def gate_class(kind: str) -> type[LinearGate]:
    """The class of a kind of gate.

    Raises:
        GuardError: no such kind is registered.
    """
    if kind not in GATES:
        raise GuardError(f"unknown kind of gate {kind!r}: this version knows {', '.join(GATES)}")
    return GATES[kind]


def make_gate(gate: Gate, vectors: Tensor) -> LinearGate:
    """The scorer of a guard's gate; ``vectors`` (n, d), one per layer.

    Raises:
        GuardError: no such kind is registered, or it reads logits where this gate gets none.
    """
    scorer = gate_class(gate.kind).make(gate, vectors)
    if scorer.reads_logits and (gate.source != "text" or gate.per_layer):
        raise GuardError(
            f"a gate of kind {gate.kind} reads logits, which only the text-only pass has: give it "
            "source `text`, without per_layer"
        )
    return scorer


class Gates:
    """The gates of one guard."""

    def __init__(self, gates: Sequence[Gate], tensors: Mapping[str, Tensor]) -> None:
        """``tensors`` as in ``Guard``."""
        self.settings = list(gates)
        self.scorers = [make_gate(gate, tensors[f"gate.{n}"]) for n, gate in enumerate(gates)]

    def layers(self, source: str, with_mean: bool = False) -> frozenset[int]:
        """Layers that gates of a source read; ``with_mean``: those whose mean they read."""
        of_source = [gate for gate in self.settings if gate.source == source]
        found = [gate.layers for gate in of_source if gate.reads_mean or not with_mean]
        return frozenset(layer for layers in found for layer in layers)


class GateReading:
    """Scores the gates of one source in one forward pass. Keeps states until a gate is decided.

    ``any_judged``: whether any row of the request has a verdict.
    """

    def __init__(self, gates: Gates, source: str, any_judged: bool = True) -> None:
        self._any_judged = any_judged
        self.layers = gates.layers(source)
        self.mean_layers = gates.layers(source, with_mean=True)
        self._gates = gates
        self._at: dict[int, list[tuple[int, int]]] = {}  # by layer: (gate, place) pairs
        for index, gate in enumerate(gates.settings):
            for place, layer in enumerate(gate.layers) if gate.source == source else ():
                self._at.setdefault(layer, []).append((index, place))
        self._held: dict[int, dict[int, Tensor]] = {}
        # Whether a gate needs the logits of the pass.
        self.reads_logits = any(
            gates.scorers[index].needs_logits(any_judged)
            for index, gate in enumerate(gates.settings)
            if gate.source == source
        )
        self._scored: dict[int, Tensor] = {}  # linear scores of gates that wait for the logits

    def read(self, request: Request, layer: int, states: Tensor) -> None:
        """Take a layer's states (B, d) at the last prompt token and score the gates it decides.
        At ``mean_layers`` all that is read of a text stands behind them, (B, k d).

        A gate with ``per_layer`` is scored at each of its layers, others after their last layer, or
        by ``read_logits``.

        Raises:
            GuardRuntimeError: a score is NaN or Inf; the request is blocked.
        """
        for index, place in self._at.get(layer, ()):
            gate, scorer = self._gates.settings[index], self._gates.scorers[index]
            seen = states[:, : scorer.vectors.shape[1]]
            if gate.per_layer:
                scores = scorer.scores(seen[:, None], slice(place, place + 1))
                request.latch(index, place, _finite(scores))
                continue
            held = self._held.setdefault(index, {})
            held[place] = seen
            if len(held) == len(gate.layers):
                stacked = torch.stack([held[n].to(states.device) for n in range(len(held))], 1)
                del self._held[index]
                scores = scorer.scores(stacked)
                if scorer.needs_logits(self._any_judged):
                    self._scored[index] = scores
                    continue
                if scorer.reads_logits:  # and there are none to add
                    scores = torch.cat([scores, torch.zeros_like(scores[:, :1])], 1)
                request.latch(index, None, _finite(scores))

    def read_logits(self, request: Request, logits: Tensor) -> None:
        """Decide the gates that wait for the logits (B, vocabulary) at the last prompt token.

        Raises:
            GuardRuntimeError: a score is NaN or Inf; the request is blocked.
        """
        judged = torch.tensor(request.judged, device=logits.device)
        for index, scores in self._scored.items():
            said = self._gates.scorers[index].refuses(logits, judged)
            request.refused = [a or b for a, b in zip(request.refused, said, strict=True)]
            added = self._gates.scorers[index].refusal(logits, judged)
            parts = torch.cat([scores, added[:, None].to(scores)], 1)
            request.latch(index, None, _finite(parts))
        self._scored.clear()


def _finite(scores: Tensor) -> list[list[float]]:
    table: list[list[float]] = scores.tolist()
    if not all(math.isfinite(score) for row in table for score in row):
        raise GuardRuntimeError(
            "the request is blocked: a gate score is NaN or Inf. The model's weights are damaged, "
            "or its dtype overflows (try float32)"
        )
    return table
