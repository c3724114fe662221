"""Loads a VLM and its processor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor

from vlm_safeguard.errors import ModelError
from vlm_safeguard.model.checkpoint import read_model
from vlm_safeguard.model.weights import input_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class LoadedModel:
    """A model in evaluation mode, its processor, and the name it was loaded from."""

    model: Any
    processor: Any
    name: str

    @property
    def device(self) -> torch.device:
        """The device of the model's inputs."""
        return input_device(self.model)


def load(
    name: str | Path,
    dtype: str = "float32",
    device: str = "cpu",
    *,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a VLM and its processor.

    Args:
        name: a folder, or a name on the hub. A folder is loaded without network access.
        dtype: "float32", "bfloat16" or "float16".
        device: for example "cpu" or "cuda".
        trust_remote_code: run Python files of the checkpoint. If False, a checkpoint that needs
            them is refused without asking.

    Raises:
        ModelError: the folder is missing or not a model, the model takes no images, the checkpoint
            needs its own code, the weights cannot be read, a tensor is missing, unexpected or of
            another shape, or the device cannot be used.
    """
    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}: use one of {', '.join(DTYPES)}")
    place = _device(device)
    local = _local_folder(str(name))
    name = Path(name).expanduser() if local else name
    options = {"local_files_only": local, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(str(name), **options)
        if not hasattr(config, "vision_config"):
            raise ModelError(
                f"{name} is a {config.model_type} model and takes no images: VLM-Safeguard "
                "guards vision-language models (for example LLaVA)"
            )
        processor = AutoProcessor.from_pretrained(str(name), **options)
        model = read_model(str(name), dtype=DTYPES[dtype], **options)
    except ModelError:
        raise
    except Exception as error:  # transformers, safetensors and json each raise their own kinds
        reason = str(error).strip().splitlines()
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{name} needs to run its own code, which is off by default. Read the code, then "
                "use load(..., trust_remote_code=True)"
            ) from error
        raise ModelError(
            f"cannot load the model {name}: {reason[0] if reason else type(error).__name__}. "
            "Check that the folder holds a complete Hugging Face checkpoint (config.json, "
            "weights, processor)."
        ) from error
    if getattr(processor, "image_processor", None) is None:
        raise ModelError(f"{name} has no image processor beside its tokenizer")
    if processor.chat_template is None:
        raise ModelError(f"{name} has no chat template: save its processor with one")
    processor.tokenizer.padding_side = "left"
    return LoadedModel(model.to(place).eval(), processor, str(name))


def _device(name: str) -> torch.device:
    """The device called ``name``, checked with a small tensor before the model is loaded."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:  # each backend raises its own kinds
        reason = str(error).splitlines()
        raise ModelError(
            f"the device {name!r} cannot be used here: {reason[0] if reason else type(error)}"
        ) from error
    return device


def _local_folder(name: str) -> bool:
    """Whether ``name`` is a local folder. Raises an error for a path without a model."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name} is a folder without config.json, so not a model's folder")
        return True
    if path.exists():
        raise ModelError(f"{name} is a file: name the model's folder")
    if name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") != 1:
        raise ModelError(
            f"there is no model folder {name}. The embedded model is made by "
            "`vlm-safeguard assemble`, which prints its folder"
        )
    return False
