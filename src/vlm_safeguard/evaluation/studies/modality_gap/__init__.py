"""The modality gap of a model: how much a picture weakens its refusals, compared with text only."""

from vlm_safeguard.evaluation.studies.modality_gap.study import study
from vlm_safeguard.evaluation.studies.modality_gap.write_up import write

__all__ = ["study", "write"]
