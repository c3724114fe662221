"""Loads a model in vLLM under a guard, for programs of ours that ask it."""

from __future__ import annotations

import os
from typing import Any

from vlm_safeguard.engines.vllm.plugin import MODE, VARIABLE
from vlm_safeguard.errors import GuardError, ModelError, SafeguardError
from vlm_safeguard.model.load_options import LoadOptions

_TAKEN = ("dtype", "revision", "trust_remote_code")  # of the load options, by vLLM
# What vLLM logs is no data, and nothing is reported to its makers.
_QUIET = {"VLLM_LOGGING_STREAM": "ext://sys.stderr", "VLLM_NO_USAGE_STATS": "1"}


def load_in_vllm(
    model: str,
    guard: str | None,
    *,
    mode: str = "enforce",
    options: LoadOptions | None = None,
    max_len: int = 4096,
    batch: int = 8,
    images: int = 1,
    memory: float | None = None,
    ranks: int = 1,
) -> Any:
    """Start vLLM in this process, which must not have imported it before.

    Args:
        model: a folder or hub name.
        guard: a folder or hub name; None answers without a guard, for measurements.
        mode: "enforce", or "monitor": gates are read, and nothing changes.
        options: how the model is loaded.
        max_len: tokens of a prompt and its answer, at most.
        batch: requests that are answered together, at most.
        images: pictures of a request, at most.
        memory: share of the GPU's memory; None: vLLM's own choice.
        ranks: GPUs over which each layer is divided (tensor parallelism).

    Returns:
        The ``vllm.LLM``.

    Raises:
        GuardError: vLLM did not load the plugin, or the guard cannot be used.
        ModelError: vLLM cannot load the model, or an option is none of vLLM's.
        SafeguardError: vLLM is missing.
    """
    chosen = _chosen(options or LoadOptions())
    if memory is not None:
        chosen["gpu_memory_utilization"] = memory
    if guard is None:
        os.environ.pop(VARIABLE, None)  # where a guard is armed, the plugin refuses this
    else:
        os.environ |= {VARIABLE: guard, MODE: mode}
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        from vllm import LLM
    except ModuleNotFoundError as error:
        raise SafeguardError(
            f"vLLM is missing ({error.name}): docs/vllm.md says how it is installed"
        ) from error
    try:
        loaded = LLM(
            model=model,
            max_model_len=max_len,
            max_num_seqs=2 * batch,  # a request and its text
            limit_mm_per_prompt={"image": images},
            tensor_parallel_size=ranks,
            seed=0,
            **chosen,
        )
    except SafeguardError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise ModelError(f"vLLM cannot load {model}: {reason}") from error
    if guard is not None:
        from vlm_safeguard.engines.vllm.arming import armed

        if armed() != (guard, mode):
            raise GuardError(
                "vLLM did not load the guard's plugin: install this package where vLLM is, and let "
                "VLLM_PLUGINS, if it is set, name vlm_safeguard"
            )
    return loaded


def _chosen(options: LoadOptions) -> dict[str, Any]:
    standard = vars(LoadOptions())
    for name, value in vars(options).items():
        if name not in _TAKEN and value != standard[name]:
            flag = f"--{name.replace('_', '-')}"
            instead = " and set HF_HUB_OFFLINE=1" if name == "local_files_only" else ""
            raise ModelError(f"vLLM does not take {flag}: leave it out{instead}")
    return {name: value for name in _TAKEN if (value := getattr(options, name))}
