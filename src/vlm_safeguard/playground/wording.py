"""Says in words what the guard decided."""

from __future__ import annotations

from vlm_safeguard.artifact.config import Gate
from vlm_safeguard.runtime.attestation import Decision

GATE_NAMES = {"text": "text gate", "vlm": "gate in the VLM"}
_READS = {"text": "it reads the request as text", "vlm": "it reads the request as asked"}


def verdict(decision: Decision) -> str:
    """One or two short sentences."""
    if not decision.fired:
        return "No gate opened. The guard changes nothing, so both answers are the same."
    opened = [f"the {GATE_NAMES[source]} ({_READS[source]})" for source in decision.sources]
    return f"Opened: {' and '.join(opened)}. The guard steers the answer."


def gate_title(gate: Gate) -> str:
    """Which gate it is and what it reads."""
    first, last = gate.layers[0], gate.layers[-1]
    read = f"layer {first}" if len(gate.layers) == 1 else f"layers {first} to {last}"
    name = GATE_NAMES[gate.source]
    return f"{name[0].upper()}{name[1:]}: {read}{', refusal signs' if gate.openings else ''}"
