"""Reports what the guard did in a request: decisions, hook calls and changed positions per row."""

from __future__ import annotations

from dataclasses import dataclass

from vlm_safeguard.runtime.request import Calls, Request


@dataclass(frozen=True)
class Decision:
    """What the guard decided for one row. ``scores``: per gate, one per layer, NaN if unread."""

    fired: bool
    by_text: bool
    by_vlm: bool
    scores: dict[str, list[float]]


@dataclass(frozen=True)
class CallCount:
    """Forward passes, and the calls of guarded layers' hooks in them, made and expected.

    The text-only pass ends at the layer that decides it: fewer calls are expected of it.
    """

    passes: int
    made: int
    expected: int


@dataclass(frozen=True)
class RowAttestation:
    """One row: its decision, and how many token positions each steered layer changed.

    ``changed`` names every layer that changed something and no other. A position that later
    forward calls go through again (decoding without a cache) counts once. In a batch, positions
    behind a row's end count too, where ``generate`` goes on for other rows.
    """

    decision: Decision
    changed: dict[int, int]


@dataclass(frozen=True)
class Attestation:
    """One request, up to its last forward call that ran to its end under guard.

    ``layers`` carry a hook. A forward call whose hook calls are not the expected ones is an error
    and its output is withheld, so ``made`` and ``expected`` are equal in any attestation there is.
    """

    layers: tuple[int, ...]
    text_pass: CallCount
    calls: CallCount
    rows: tuple[RowAttestation, ...]


def decisions_of(request: Request) -> list[Decision]:
    """One decision per row, in batch order. The prompt must have been read to its end."""
    by_text, by_vlm = request.fired("text"), request.fired("vlm")
    named = {
        f"{request.gates[index].source}.{index}": scores for index, scores in request.scores.items()
    }
    return [
        Decision(
            by_text[row] or by_vlm[row],
            by_text[row],
            by_vlm[row],
            {name: list(table[row]) for name, table in named.items()},
        )
        for row in range(request.rows)
    ]


def attest(request: Request, layers: tuple[int, ...]) -> Attestation:
    """The attestation of a request whose prompt has been read to its end."""
    changed: list[dict[int, int]] = [{} for _ in range(request.rows)]
    for layer in sorted({*request.prompt_doses, *request.later_doses}):
        for doses, columns in (
            (request.prompt_doses, request.prompt_columns),
            (request.later_doses, request.later_columns),
        ):
            dose = doses.get(layer)
            if dose is None:
                continue
            # The whole prompt (positions `all`) is steered padding and all, which is no token.
            whole = doses is request.prompt_doses and columns == request.prompt_width
            for row in dose.rows:
                count = columns - (request.padding[row] if whole else 0)
                if count:
                    changed[row][layer] = changed[row].get(layer, 0) + count
    return Attestation(
        layers,
        _frozen(request.text_calls),
        _frozen(request.calls),
        tuple(map(RowAttestation, decisions_of(request), changed)),
    )


def _frozen(calls: Calls) -> CallCount:
    return CallCount(calls.passes, calls.made, calls.expected)
