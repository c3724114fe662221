"""Loads a VLM and its processor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoProcessor

from vlm_safeguard.errors import ModelError
from vlm_safeguard.model.chat_template import find_template
from vlm_safeguard.model.checkpoint import read_model
from vlm_safeguard.model.quantization import quantization_config
from vlm_safeguard.model.weights import input_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"

# Options of ``from_pretrained`` that say where the files come from, for all of them alike.
_OF_FILES = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)


@dataclass
class LoadedModel:
    """A model in evaluation mode, its processor, and the name it was loaded from.

    ``revision``: the commit on the hub; "" for a folder.
    """

    model: Any
    processor: Any
    name: str
    revision: str = ""

    @property
    def device(self) -> torch.device:
        """The device of the model's inputs."""
        return input_device(self.model)


def load(
    name: str | Path,
    dtype: str | torch.dtype = AUTO,
    device: str | torch.device = AUTO,
    *,
    device_map: Any = None,
    quantization: str | None = None,
    trust_remote_code: bool = False,
    local_files_only: bool = False,
    **options: Any,
) -> LoadedModel:
    """Load a VLM and its processor.

    Args:
        name: a folder, or a name on the hub. A folder is loaded without network access.
        dtype: "float32", "bfloat16", "float16", the same of torch, or "auto": that of the
            checkpoint, but float32 for float16 on a CPU, which is slow there and overflows.
        device: for example "cpu" or "cuda". "auto": CUDA, else MPS, else the CPU.
        device_map: spreads the model over devices, instead of ``device``; needs accelerate.
        quantization: "4bit" or "8bit" (bitsandbytes), or "int8" (torchao).
        trust_remote_code: run Python files of the checkpoint. If False, a checkpoint that needs
            them is refused without asking.
        local_files_only: do not use the network.
        options: further options of ``from_pretrained``, such as ``revision``, ``token`` or
            ``attn_implementation``.

    Raises:
        ModelError: the folder is missing or not a model, the model takes no images, the checkpoint
            needs its own code, the weights cannot be read, a tensor is missing, unexpected or of
            another shape, the device cannot be used, a package is missing, or two options exclude
            each other.
    """
    kind = torch_dtype(dtype)
    if device_map is not None and str(device) != AUTO:
        raise ModelError("device and device_map exclude each other: leave one of them out")
    place = None if device_map is not None else torch_device(str(device))
    local = _local_folder(str(name))
    name = Path(name).expanduser() if local else name
    if local and options.get("revision") is not None:
        raise ModelError(
            f"{name} is a folder, and only models on the hub have revisions: leave revision out"
        )
    if quantization is not None:
        if "quantization_config" in options:
            raise ModelError("quantization and quantization_config exclude each other")
        options["quantization_config"] = quantization_config(quantization, kind)
    options["local_files_only"] = local or local_files_only
    files = {key: options.pop(key) for key in _OF_FILES if key in options}
    trusted, revision = {"trust_remote_code": trust_remote_code}, ""
    try:
        config = AutoConfig.from_pretrained(str(name), **files, **trusted)
        if not hasattr(config, "vision_config"):
            raise ModelError(
                f"{name} is a {config.model_type} model and takes no images: VLM-Safeguard "
                "guards vision-language models (for example LLaVA)"
            )
        if not local and (revision := _commit(str(name), files)):
            files["revision"] = revision  # all files of one state of the repository
        processor = AutoProcessor.from_pretrained(str(name), **files, **trusted)
        quantised = "quantization_config" in options or hasattr(config, "quantization_config")
        if place is not None and quantised:  # such weights do not move once they are loaded
            device_map = {"": place}
        options |= files | trusted | {"dtype": kind, "device_map": device_map}
        # An adapter beside the model is looked for by these: with the same access to the network.
        model = read_model(str(name), adapter_kwargs=files, **options)
    except ModelError:
        raise
    except Exception as error:  # transformers, safetensors and json each raise their own kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{name} needs to run its own code, which is off by default. Read the code, then "
                "use load(..., trust_remote_code=True) or --trust-remote-code"
            ) from error
        where = (
            "the folder holds" if local else "the name is right, the network can be used and it is"
        )
        raise ModelError(
            f"cannot load the model {name}: {reason}. Check that {where} a complete Hugging Face "
            "checkpoint (config.json, weights, processor), and the options of load"
        ) from error
    if getattr(processor, "image_processor", None) is None:
        raise ModelError(
            f"{name} has no image processor beside its tokenizer: get the checkpoint with its "
            "preprocessor_config.json or processor_config.json"
        )
    if find_template(processor) is None:
        raise ModelError(f"{name} has no chat template: save its processor with one")
    processor.tokenizer.padding_side = "left"
    if device_map is None:
        model = on_device(model, kind, place)
    return LoadedModel(model.eval(), processor, str(name), revision)


def _commit(repository: str, files: dict[str, Any]) -> str:
    """The commit that the cached ``config.json`` of a repository belongs to; "" if unknown."""
    place = PurePosixPath(files.get("subfolder") or "", "config.json")
    options = {key: files[key] for key in ("cache_dir", "revision") if key in files}
    found = try_to_load_from_cache(repository, str(place), **options)
    # In snapshots/COMMIT of the cache.
    return Path(found).parents[len(place.parts) - 1].name if isinstance(found, str) else ""


def on_device(model: Any, kind: str | torch.dtype, place: torch.device | None) -> Any:
    """A loaded model on its device. If its dtype was left to the checkpoint (``kind`` is "auto"),
    float16 becomes float32 on a CPU, where it is slow and overflows."""
    if kind == AUTO and model.dtype == torch.float16 and place == torch.device("cpu"):
        model = model.float()
    return model.to(place)


def torch_dtype(given: str | torch.dtype) -> str | torch.dtype:
    """A dtype of torch, or "auto"."""
    if given == AUTO or given in DTYPES.values():
        return given
    if given not in DTYPES:
        raise ModelError(f"unknown dtype {str(given)!r}: use one of {', '.join((AUTO, *DTYPES))}")
    return DTYPES[str(given)]


def torch_device(name: str) -> torch.device:
    """The device called ``name``, checked with a small tensor before the model is loaded."""
    if name == AUTO:
        name = _best_device()
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:  # each backend raises its own kinds
        reason = str(error).splitlines()
        raise ModelError(
            f"the device {name!r} cannot be used here ({reason[0] if reason else type(error)}): "
            "choose another, or auto for the best there is"
        ) from error
    return device


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions that multiply matrices of bfloat16. Without them
    bfloat16 is many times slower than float32.

    False with a torch that cannot tell.
    """
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


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
            f"there is no model folder {name}: name a folder, or a model on the hub as "
            "owner/name. The embedded model is made by `vlm-safeguard assemble`, which prints its "
            "folder"
        )
    return False
