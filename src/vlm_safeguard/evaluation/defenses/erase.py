"""The ablation ``erase``, known to remove refusals. Never deploy it as a defence.

The guard's gate decides where; the component along the directions goes and nothing comes back.
"""

from __future__ import annotations

from vlm_safeguard.artifact.config import Steering
from vlm_safeguard.evaluation.defenses.base import Defence
from vlm_safeguard.evaluation.defenses.variants import changed
from vlm_safeguard.guard import Guard


def build(guard: Guard) -> Defence:
    steering = guard.config.steering.model_dump() | {"mode": "erase", "later": "same"}
    made = changed(guard, steering=Steering.model_validate(steering))
    return Defence("erase-ablation", guard=made)
