"""Registers tasks, scorers and the provider with inspect_ai (the package's entry point)."""

from __future__ import annotations

from inspect_ai.model import ModelAPI, modelapi

from vlm_safeguard.evaluation.harness.scorers import judged, vqa
from vlm_safeguard.evaluation.harness.tasks import TASKS, easy_vqa, prompts_file


@modelapi(name="vlm-safeguard")
def vlm_safeguard() -> type[ModelAPI]:
    """``vlm-safeguard/embedded``, ``vlm-safeguard/FOLDER`` or ``vlm-safeguard/HUB/NAME``."""
    from vlm_safeguard.evaluation.harness.provider import VlmSafeguardAPI

    return VlmSafeguardAPI


__all__ = ["TASKS", "easy_vqa", "judged", "prompts_file", "vlm_safeguard", "vqa"]
