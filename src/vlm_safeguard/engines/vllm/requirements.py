"""Refuses versions and settings of vLLM that cannot be guarded."""

from __future__ import annotations

import logging
from typing import Any

from vlm_safeguard.engines.vllm.layer_operator import OPERATOR
from vlm_safeguard.errors import GuardError
from vlm_safeguard.guard import Guard

logger = logging.getLogger(__name__)

SUPPORTED = ("0.32.0",)  # versions that the tests run
_TOKENIZERS = ("auto", "hf", "slow")  # modes that give the same tokens as transformers
_LOADERS = ("auto", "hf", "safetensors")  # that take the weights from the checkpoint as they are


def check_version(found: str) -> None:
    """Refuse a version of vLLM that no test ran: the guard reaches into its inner classes.

    Raises:
        GuardError: names the versions that are supported.
    """
    if found.partition("+")[0] not in SUPPORTED:
        raise GuardError(
            f"vLLM {found} is not supported: the guard was tested with {', '.join(SUPPORTED)}"
        )


def check_guard(guard: Guard) -> None:
    """Refuse a guard that vLLM cannot run.

    Raises:
        GuardError: it steers every position of a prompt, which vLLM computes in parts.
    """
    if guard.config.steering.positions == "all":
        raise GuardError(
            "this guard steers all positions of a prompt, and vLLM computes prompts in parts and "
            "keeps them for other requests: calibrate one with positions `generated`"
        )


def check_settings(guard: Guard, config: Any) -> None:
    """Refuse settings of an engine under which a guard would not see every token.

    Args:
        guard: the guard.
        config: the ``VllmConfig``.

    Raises:
        GuardError: names the setting, and what to do.
    """
    model, parallel, scheduler = (
        config.model_config,
        config.parallel_config,
        config.scheduler_config,
    )
    identity = guard.config.model
    refused = {
        "speculative decoding": config.speculative_config is not None,
        "LoRA adapters": config.lora_config is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size != 1,
        "prefill context parallelism": parallel.prefill_context_parallel_size != 1,
        "batch-sharded sampling": bool(parallel.enable_batch_sharded_sampling),
        "microbatches (DBO)": bool(getattr(parallel, "use_ubatching", False)),
        "a KV connector": config.kv_transfer_config is not None,
        "an encoder connector": config.ec_transfer_config is not None,
        "weight transfer": config.weight_transfer_config is not None,
        "sleep mode": bool(model.enable_sleep_mode),
        "prompt embeddings": bool(model.enable_prompt_embeds),
        "fast prefill with a shared KV cache": bool(config.cache_config.kv_sharing_fast_prefill),
        "trace replay": bool(getattr(model, "enable_trace_replay", False)),
        "hf_overrides": bool(model.hf_overrides),
        "another tokenizer": model.tokenizer != model.model,
        "another revision of the tokenizer": model.tokenizer_revision != model.revision,
        f"the tokenizer mode {model.tokenizer_mode}": model.tokenizer_mode not in _TOKENIZERS,
        "another configuration": model.hf_config_path not in (None, model.model),
        "quantised weights": model.quantization is not None,
        "a scheduler of its own": scheduler.scheduler_cls is not None,
        f"the load format {config.load_config.load_format}": (
            config.load_config.load_format not in _LOADERS
        ),
        "a model that does not generate": model.runner_type != "generate",
        "an encoder-decoder model": bool(model.is_encoder_decoder),
        "a diffusion model": bool(getattr(model, "is_diffusion", False)),
    }
    for what, given in refused.items():
        if given:
            raise GuardError(f"under a guard vLLM cannot use {what}: leave it out")
    if not model.is_multimodal_model:
        raise GuardError(f"{model.model} takes no images: VLM-Safeguard guards VLMs")
    dtype = str(model.dtype).removeprefix("torch.")
    if identity.dtype and dtype != identity.dtype:
        raise GuardError(
            f"this guard is for {identity.name} in {identity.dtype}, and vLLM runs it in {dtype}: "
            f"start it with --dtype {identity.dtype}"
        )
    size, layers = model.get_hidden_size(), model.get_total_num_hidden_layers()
    if (size, layers) != (identity.hidden_size, identity.layers):
        raise GuardError(
            f"this guard is for {identity.name} ({identity.layers} layers of "
            f"{identity.hidden_size}), the model has {layers} layers of {size}"
        )


def keep_operator(config: Any, layers: list[int]) -> None:
    """Have vLLM keep the guard's operator in the model that it compiles.

    It changes ``config``. Graphs are split at the operator, which is no part of a CUDA graph; so
    there are none of whole passes.

    Args:
        config: a ``VllmConfig``.
        layers: those that are guarded.

    Raises:
        GuardError: the configuration has an ``additional_config`` that cannot be added to.
    """
    from vllm.config import CompilationMode, CUDAGraphMode

    compiling = config.compilation_config
    in_pieces = compiling.mode == CompilationMode.VLLM_COMPILE
    if in_pieces:
        compiling.splitting_ops = [*(compiling.splitting_ops or ()), OPERATOR]
    if compiling.cudagraph_mode != CUDAGraphMode.NONE:
        in_pieces = in_pieces and compiling.splitting_ops_contain_attention()
        compiling.cudagraph_mode = CUDAGraphMode.PIECEWISE if in_pieces else CUDAGraphMode.NONE
        if not in_pieces:  # as vLLM does it
            compiling.max_cudagraph_capture_size, compiling.cudagraph_capture_sizes = 0, []
        logger.info("CUDA graphs under the guard: %s", compiling.cudagraph_mode.name)
    known = config.additional_config or {}
    if not isinstance(known, dict):
        raise GuardError("under a guard vLLM's additional_config must be a dictionary")
    # vLLM keeps compiled models on disk, by a digest of the configuration. The numbers of guarded
    # layers are written into them.
    config.additional_config = {**known, "vlm_safeguard": layers}


def check_graphs(config: Any) -> None:
    """Refuse graphs without the guard's operator.

    Args:
        config: a ``VllmConfig``, from ``keep_operator`` or elsewhere.

    Raises:
        GuardError: names the setting.
    """
    import vllm.envs
    from vllm.config import CompilationMode, CUDAGraphMode

    compiling = config.compilation_config
    graphs = compiling.cudagraph_mode != CUDAGraphMode.NONE
    unguarded = {
        "stock torch.compile": compiling.mode == CompilationMode.STOCK_TORCH_COMPILE,
        "CUDA graphs of whole passes": compiling.cudagraph_mode.has_full_cudagraphs(),
        "CUDA graphs that are not split at its operator": (
            graphs and OPERATOR not in (compiling.splitting_ops or ())
        ),
        "breakable CUDA graphs": graphs and bool(vllm.envs.VLLM_USE_BREAKABLE_CUDAGRAPH),
    }
    for what, given in unguarded.items():
        if given:
            raise GuardError(
                f"under a guard vLLM cannot use {what}: start it with --enforce-eager, or with its "
                "own defaults"
            )
