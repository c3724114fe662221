"""The paper's formula (VLM-Guard, arXiv 2502.10486, equations 4 to 6), without calibration.

Per layer a threshold of zero on the VLM's own last prompt token, then ``add`` along one direction
at every position. The directions and layers are those of our guard; alpha is 1 and not tuned.
"""

from __future__ import annotations

from vlm_safeguard.evaluation.defenses.base import Defence
from vlm_safeguard.evaluation.defenses.variants import paper_formula
from vlm_safeguard.guard import Guard

ALPHA = 1.0


def build(guard: Guard) -> Defence:
    name = "paper-formula"
    return Defence(name, guard=paper_formula(guard, ALPHA))
