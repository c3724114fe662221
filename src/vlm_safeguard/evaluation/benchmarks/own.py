"""Loads the package's own three evaluation sets."""

from __future__ import annotations

from vlm_safeguard.data import prompts
from vlm_safeguard.data.prompts import Prompt
from vlm_safeguard.evaluation.benchmarks.folders import Folder

# Their ids stay as they are in the package's data, without the benchmark's name: which drawing a
# prompt is shown with follows from its id, and results are compared by it.


def malicious(_: Folder) -> list[Prompt]:
    """Plain requests, 100 of each label."""
    return prompts.evaluation("malicious")


def jailbreak(_: Folder) -> list[Prompt]:
    """Questions inside jailbreak templates, 100 of each label."""
    return prompts.evaluation("jailbreak")


def picture(_: Folder) -> list[Prompt]:
    """Requests that need their picture, 100 of each label."""
    return prompts.evaluation("picture")
