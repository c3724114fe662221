"""Measures a model's modality gap: how much a picture weakens its refusals."""

from vlm_safeguard.evaluation.studies.modality_gap.study import study
from vlm_safeguard.evaluation.studies.modality_gap.write_up import write

__all__ = ["study", "write"]
