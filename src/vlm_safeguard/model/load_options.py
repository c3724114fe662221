"""Model loading options that all commands share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class LoadOptions:
    """Arguments of ``load``, where they are explained; each with the help text of its option."""

    dtype: str = _option("auto", "float32, bfloat16, float16 or auto: the checkpoint's.")
    device: str = _option("auto", "cpu, cuda, mps, ... or auto: CUDA, else MPS, else the CPU.")
    device_map: str | None = _option(None, "Spread the model over devices: auto, balanced, ...")
    revision: str | None = _option(None, "Branch, tag or commit of the model on the hub.")
    quantization: str | None = _option(None, "4bit or 8bit (bitsandbytes), or int8 (torchao).")
    attn_implementation: str | None = _option(None, "eager, sdpa, flash_attention_2, ...")
    trust_remote_code: bool = _option(False, "Run Python files of the checkpoint.")
    local_files_only: bool = _option(False, "Load models without network access.")

    def given(self) -> dict[str, Any]:
        """``dtype`` and ``device``, and of the others those that are set."""
        always = ("dtype", "device")
        return {name: value for name, value in vars(self).items() if value or name in always}
