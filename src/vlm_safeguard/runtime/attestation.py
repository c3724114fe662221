"""Reports what the guard did in a request: decisions, hook calls and changed positions per row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlm_safeguard.runtime.request import Calls, Request


@dataclass(frozen=True)
class Decision:
    """What the guard decided for one row.

    Attributes:
        fired: whether any gate opened.
        by_text: whether a gate of the text-only pass opened.
        by_vlm: whether a gate in the VLM opened.
        scores: for each gate, what decides: one score, or with ``per_layer`` one for each layer. A
            gate opens above 0; NaN: it was not read.
        parts: for each gate, what each of its layers adds, and last, in a gate that reads logits,
            what the refusal signs add. Where a score is a sum, it is that of these.
    """

    fired: bool
    by_text: bool
    by_vlm: bool
    scores: dict[str, list[float]]
    parts: dict[str, list[float]]

    @property
    def sources(self) -> tuple[Literal["text", "vlm"], ...]:
        """Where the gates that opened read: "text", "vlm"."""
        return (*(("text",) if self.by_text else ()), *(("vlm",) if self.by_vlm else ()))


@dataclass(frozen=True)
class CallCount:
    """Number of forward passes, and of hook calls made and expected in them.

    The text-only pass ends at the last layer that is needed, so fewer calls are expected of it.
    """

    passes: int
    made: int
    expected: int


@dataclass(frozen=True)
class RowAttestation:
    """One row: its decision, and how many token positions each steered layer changed.

    ``changed`` has only the layers that changed something. A position that is computed again
    (decoding without a cache) counts once. In a batch, positions after a row's end count too, if
    ``generate`` continues for other rows.
    """

    decision: Decision
    changed: dict[int, int]


@dataclass(frozen=True)
class Attestation:
    """What the guard did in one request, up to the last completed forward call.

    ``layers`` have a hook. If hook calls are missing, the forward call raises an error and its
    output is withheld, so ``made`` equals ``expected`` in every attestation.
    """

    layers: tuple[int, ...]
    text_pass: CallCount
    calls: CallCount
    rows: tuple[RowAttestation, ...]


def decisions_of(request: Request) -> list[Decision]:
    """One decision per row (per sequence, where ``generate`` has returned), in batch order. The
    prompt must have been processed completely."""
    by_text, by_vlm = request.fired("text"), request.fired("vlm")
    decisions = []
    for row in request.reported:
        scores, parts = dict[str, list[float]](), dict[str, list[float]]()
        for index, table in request.scores.items():
            gate = request.gates[index]
            name, own = f"{gate.source}.{index}", list(table[row])
            parts[name] = own
            scores[name] = own if gate.per_layer else [sum(own)]
        fired = by_text[row] or by_vlm[row]
        decisions.append(Decision(fired, by_text[row], by_vlm[row], scores, parts))
    return decisions


def attest(request: Request, layers: tuple[int, ...]) -> Attestation:
    """The attestation of a request whose prompt has been read to its end."""
    changed: list[dict[int, int]] = [{} for _ in range(request.rows)]
    at_prompt, later = request.doses[0], request.doses[1]  # later steps change the same rows
    for layer in sorted({*at_prompt, *later}):
        for doses, columns in (
            (at_prompt, request.prompt_columns),
            (later, request.later_columns),
        ):
            dose = doses.get(layer)
            if dose is None:
                continue
            # The whole prompt (positions `all`) is steered padding and all, which is no token.
            whole = doses is at_prompt and columns == request.prompt_width
            for row in dose.rows:
                count = columns - (request.padding[row] if whole else 0)
                if count:
                    changed[row][layer] = changed[row].get(layer, 0) + count
    return Attestation(
        layers,
        _frozen(request.text_calls),
        _frozen(request.calls),
        tuple(
            RowAttestation(decision, changed[row])
            for decision, row in zip(decisions_of(request), request.reported, strict=True)
        ),
    )


def _frozen(calls: Calls) -> CallCount:
    return CallCount(calls.passes, calls.made, calls.expected)
