"""Ways of quantising a model while it is loaded, by name."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from vlm_safeguard.errors import ModelError


def _four_bits(dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def _eight_bits(_: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def _int8(_: torch.dtype) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


# By name: the package that does it, our extra that has it, and its configuration for a dtype to
# compute in.
_QUANTIZATIONS: dict[str, tuple[str, str, Callable[[torch.dtype], Any]]] = {
    "4bit": ("bitsandbytes", "quantization", _four_bits),
    "8bit": ("bitsandbytes", "quantization", _eight_bits),
    "int8": ("torchao", "int8", _int8),
}


def quantization_config(name: str, dtype: str | torch.dtype) -> Any:
    """The ``quantization_config`` of transformers for a way of quantising.

    Args:
        name: "4bit" or "8bit" (bitsandbytes), or "int8" (torchao).
        dtype: what to compute in; bfloat16 if "auto".

    Raises:
        ModelError: there is no such way, or a package for it is missing.
    """
    if name not in _QUANTIZATIONS:
        raise ModelError(f"unknown quantization {name!r}: use one of {', '.join(_QUANTIZATIONS)}")
    package, extra, make = _QUANTIZATIONS[name]
    for needed in (package, "accelerate"):
        if find_spec(needed) is None:
            raise ModelError(
                f"quantization {name} needs {needed}: pip install 'vlm-safeguard[{extra}]'"
            )
    return make(dtype if isinstance(dtype, torch.dtype) else torch.bfloat16)
