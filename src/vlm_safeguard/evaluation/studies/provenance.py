"""Says what a study was made with: the code and the model."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from vlm_safeguard.model.fingerprint import template_digest
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.weights import weights_digest
from vlm_safeguard.utils.checkout import commit

SHOWN = 16  # digits of each SHA-256 on a page


def provenance(loaded: LoadedModel) -> dict[str, Any]:
    """The package's commit (None outside a checkout) and version, and the SHA-256 of the model's
    weights (see ``weights_digest``) and of its chat template."""
    return {
        "commit": commit(),
        "version": version("vlm-safeguard"),
        "weights_sha256": weights_digest(loaded.model),
        "template_sha256": template_digest(loaded.processor),
    }


def made_with(facts: Mapping[str, Any]) -> str:
    """What ``provenance`` found, for the page of a study."""
    code = f"commit `{facts['commit']}`, " if facts["commit"] else ""
    return (
        f"{code}version {facts['version']}; weights SHA-256 `{facts['weights_sha256'][:SHOWN]}`, "
        f"chat template `{facts['template_sha256'][:SHOWN]}`"
    )
