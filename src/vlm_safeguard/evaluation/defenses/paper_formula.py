"""The paper's formula (VLM-Guard, arXiv 2502.10486, equations 4 to 6), without calibration.

Per layer a threshold of zero on the VLM's own last prompt token, then ``add`` along one direction
at every position. The directions and layers are those of our guard; alpha is 1 and not tuned.
"""

from __future__ import annotations

import torch

from vlm_safeguard.artifact.config import Gate, Steering
from vlm_safeguard.evaluation.defenses.base import Defence
from vlm_safeguard.evaluation.defenses.variants import changed
from vlm_safeguard.guard import Guard

ALPHA = 1.0


def build(guard: Guard) -> Defence:
    layers = guard.config.steering.layers
    steering = Steering(
        mode="add", query="pass", positions="all", layers=layers, rank=1, alpha=ALPHA
    )
    tensors = {}
    for layer in layers:
        tensors[f"directions.{layer}"] = guard.tensors[f"directions.{layer}"][:1].contiguous()
        tensors[f"anchor.{layer}"] = guard.tensors[f"anchor.{layer}"][:1].contiguous()
    tensors["gate.0"] = torch.cat([tensors[f"directions.{n}"] for n in layers])
    gate = Gate(source="vlm", layers=layers, thresholds=[0.0] * len(layers), per_layer=True)
    made = changed(
        guard, tensors, steering=steering, gates=[gate], frame=None, reads_pictures=False
    )
    return Defence("paper-formula", guard=made)
