"""The ablation ``erase``, known to remove refusals. Never deploy it as a defence.

The guard's gate decides where; the component along the directions goes and nothing comes back.
"""

from __future__ import annotations

from vlm_safeguard.evaluation.defenses.base import Defence
from vlm_safeguard.evaluation.defenses.variants import with_steering
from vlm_safeguard.guard import Guard


def build(guard: Guard) -> Defence:
    name = "erase-ablation"
    return Defence(name, guard=with_steering(guard, mode="erase"))
