"""Checks that a guard belongs to the model that vLLM loads."""

from __future__ import annotations

import tempfile
from typing import Any

from transformers import AutoProcessor

from vlm_safeguard.guard import Guard
from vlm_safeguard.model.loading import load


def check_model(guard: Guard, model_config: Any) -> None:
    """Check configuration, weights, chat template and image tokens of vLLM's model.

    vLLM names and packs weights in its own way, so the checkpoint is read as transformers reads it,
    tensor by tensor, without loading it as a whole.

    Args:
        guard: the guard.
        model_config: vLLM's ``ModelConfig``.

    Raises:
        GuardError: the guard belongs to another model.
        ModelError: the checkpoint cannot be read.
    """
    with tempfile.TemporaryDirectory() as offloaded:
        loaded = load(
            model_config.model,
            dtype=guard.config.model.dtype or "auto",
            device_map={"": "disk"},
            offload_folder=offloaded,
            **_access(model_config),
        )
        guard.check_model(loaded.model, loaded.processor)


def load_processor(model_config: Any) -> Any:
    """The processor of vLLM's model."""
    return AutoProcessor.from_pretrained(model_config.model, **_access(model_config))


def _access(model_config: Any) -> dict[str, Any]:
    found = {"trust_remote_code": model_config.trust_remote_code}
    if model_config.revision is not None:
        found["revision"] = model_config.revision
    return found
