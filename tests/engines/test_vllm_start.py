"""What cannot be guarded stops vLLM before it takes a request."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import tiny
from tests.engines import tiny_vllm
from tests.engines.conftest import Reference
from vlm_safeguard.engines.vllm.layer_operator import OPERATOR
from vlm_safeguard.errors import GuardError, ModelError

vllm = pytest.importorskip("vllm")
requirements = pytest.importorskip("vlm_safeguard.engines.vllm.requirements")
plugin = pytest.importorskip("vlm_safeguard.engines.vllm.plugin")


def config(reference: Reference, **options: Any) -> Any:
    """The configuration that vLLM makes of its arguments. The engine's guard is armed."""
    from vllm.engine.arg_utils import EngineArgs

    settings = {"max_model_len": 512, "max_num_seqs": 4} | options
    return EngineArgs(model=str(reference.folder), **settings).create_engine_config()


def test_a_guarded_engine_runs_in_the_guards_dtype(engine: Any, reference: Reference) -> None:
    assert str(config(reference).model_config.dtype) == "torch.float32"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"enable_lora": True}, "LoRA"),
        ({"dtype": "bfloat16"}, "--dtype float32"),
        ({"load_format": "dummy"}, "load format dummy"),
        ({"hf_overrides": {"rms_norm_eps": 0.5}}, "hf_overrides"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "speculative decoding",
        ),
        ({"enable_prompt_embeds": True}, "prompt embeddings"),
    ],
)
def test_settings_that_are_not_guarded_are_refused(
    engine: Any, reference: Reference, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(GuardError, match=reason):
        config(reference, **options)


def settings(reference: Reference) -> Any:
    """Those of a `VllmConfig` that are looked at, as they should be."""
    identity = reference.guard.config.model
    model = SimpleNamespace(
        model="vlm", tokenizer="vlm", tokenizer_mode="auto", tokenizer_revision=None,
        revision=None, hf_config_path=None, is_multimodal_model=True, runner_type="generate",
        quantization=None, hf_overrides={}, is_encoder_decoder=False, enable_prompt_embeds=False,
        enable_sleep_mode=False, is_diffusion=False, enable_trace_replay=False,
        dtype=f"torch.{identity.dtype}", get_hidden_size=lambda: identity.hidden_size,
        get_total_num_hidden_layers=lambda: identity.layers,
    )  # fmt: skip
    parallel = SimpleNamespace(
        pipeline_parallel_size=1, prefill_context_parallel_size=1, use_ubatching=False,
        enable_batch_sharded_sampling=False,
    )  # fmt: skip
    return SimpleNamespace(
        model_config=model, parallel_config=parallel, speculative_config=None, lora_config=None,
        scheduler_config=SimpleNamespace(scheduler_cls=None), kv_transfer_config=None,
        ec_transfer_config=None, weight_transfer_config=None,
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        load_config=SimpleNamespace(load_format="auto"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        ("speculative_config", {}, "speculative decoding"),
        ("lora_config", {}, "LoRA adapters"),
        ("parallel_config.pipeline_parallel_size", 2, "pipeline parallelism"),
        ("parallel_config.prefill_context_parallel_size", 2, "prefill context parallelism"),
        ("parallel_config.enable_batch_sharded_sampling", True, "batch-sharded sampling"),
        ("parallel_config.use_ubatching", True, "microbatches"),
        ("kv_transfer_config", {}, "a KV connector"),
        ("ec_transfer_config", {}, "an encoder connector"),
        ("weight_transfer_config", {}, "weight transfer"),
        ("model_config.enable_sleep_mode", True, "sleep mode"),
        ("model_config.enable_prompt_embeds", True, "prompt embeddings"),
        ("cache_config.kv_sharing_fast_prefill", True, "fast prefill"),
        ("model_config.enable_trace_replay", True, "trace replay"),
        ("model_config.hf_overrides", {"a": 1}, "hf_overrides"),
        ("model_config.tokenizer", "other", "another tokenizer"),
        ("model_config.tokenizer_revision", "v2", "another revision of the tokenizer"),
        ("model_config.tokenizer_mode", "mistral", "the tokenizer mode mistral"),
        ("model_config.hf_config_path", "other", "another configuration"),
        ("model_config.quantization", "fp8", "quantised weights"),
        ("scheduler_config.scheduler_cls", "own.Scheduler", "a scheduler of its own"),
        ("load_config.load_format", "gguf", "the load format gguf"),
        ("model_config.runner_type", "pooling", "does not generate"),
        ("model_config.is_encoder_decoder", True, "an encoder-decoder model"),
        ("model_config.is_diffusion", True, "a diffusion model"),
        ("model_config.is_multimodal_model", False, "takes no images"),
        ("model_config.dtype", "torch.float16", "--dtype float32"),
    ],
)
def test_each_setting_is_refused_by_name(
    reference: Reference, place: str, value: Any, reason: str
) -> None:
    given = settings(reference)
    requirements.check_settings(reference.guard, given)
    *path, name = place.split(".")
    part = getattr(given, path[0]) if path else given
    assert hasattr(part, name)
    setattr(part, name, value)
    with pytest.raises(GuardError, match=reason):
        requirements.check_settings(reference.guard, given)


def test_graphs_are_split_at_the_operator(engine: Any, reference: Reference) -> None:
    """What vLLM takes on a GPU: graphs in pieces, and whole ones for passes of decoding."""
    found = config(reference, enforce_eager=True)
    compiling = found.compilation_config
    compiling.mode = vllm.config.CompilationMode.VLLM_COMPILE
    compiling.splitting_ops = list(compiling._attention_ops)
    compiling.cudagraph_mode = vllm.config.CUDAGraphMode.FULL_AND_PIECEWISE
    requirements.keep_operator(found, [1])
    assert compiling.splitting_ops == [*compiling._attention_ops, OPERATOR]
    assert compiling.cudagraph_mode == vllm.config.CUDAGraphMode.PIECEWISE
    requirements.check_graphs(found)


def test_without_pieces_there_are_no_cuda_graphs(engine: Any, reference: Reference) -> None:
    found = config(reference, enforce_eager=True)
    found.compilation_config.cudagraph_mode = vllm.config.CUDAGraphMode.FULL
    requirements.keep_operator(found, [1])
    assert found.compilation_config.cudagraph_mode == vllm.config.CUDAGraphMode.NONE


def test_compiled_models_of_other_layers_are_kept_apart(engine: Any, reference: Reference) -> None:
    found = config(reference, enforce_eager=True)
    digests = set()
    for layers in ([1], [1, 2], [2]):
        requirements.keep_operator(found, layers)
        digests.add(found.compute_hash())
    assert len(digests) == 3


def test_an_additional_config_that_is_no_dictionary_is_refused(
    engine: Any, reference: Reference
) -> None:
    found = config(reference, enforce_eager=True)
    found.additional_config = object()
    with pytest.raises(GuardError, match="must be a dictionary"):
        requirements.keep_operator(found, [1])


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("mode", "STOCK_TORCH_COMPILE", "stock torch.compile"),
        ("cudagraph_mode", "FULL_DECODE_ONLY", "CUDA graphs of whole passes"),
        ("cudagraph_mode", "PIECEWISE", "not split at its operator"),
    ],
)
def test_a_worker_with_other_graphs_is_refused(
    engine: Any, reference: Reference, setting: str, value: str, reason: str
) -> None:
    """As where a program makes the configuration without vLLM's arguments."""
    found = config(reference, enforce_eager=True)
    kind = {"mode": vllm.config.CompilationMode, "cudagraph_mode": vllm.config.CUDAGraphMode}
    setattr(found.compilation_config, setting, kind[setting][value])
    worker = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    with pytest.MonkeyPatch.context() as patch, pytest.raises(GuardError, match=reason):
        patch.setattr(worker.model_runner, "vllm_config", found)
        worker.model_runner.load_model()


def test_breakable_graphs_are_refused(
    engine: Any, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = config(reference, enforce_eager=True)
    found.compilation_config.cudagraph_mode = vllm.config.CUDAGraphMode.PIECEWISE
    found.compilation_config.splitting_ops = [OPERATOR]
    requirements.check_graphs(found)
    # vLLM has read its environment by now.
    monkeypatch.setattr(vllm.envs, "VLLM_USE_BREAKABLE_CUDAGRAPH", True, raising=False)
    with pytest.raises(GuardError, match="breakable"):
        requirements.check_graphs(found)


def test_another_model_is_refused(engine: Any, reference: Reference, tmp_path: Path) -> None:
    tiny_vllm.save(tmp_path, seed=1)
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(GuardError, match="weights differ"):
        EngineArgs(model=str(tmp_path), max_model_len=512).create_engine_config()


@pytest.mark.parametrize("fact", ["get_hidden_size", "get_total_num_hidden_layers"])
def test_a_model_of_another_size_is_refused(
    engine: Any, reference: Reference, monkeypatch: pytest.MonkeyPatch, fact: str
) -> None:
    found = config(reference)
    monkeypatch.setattr(vllm.config.ModelConfig, fact, lambda *_: 64)
    with pytest.raises(GuardError, match=r"the model has .*\b64\b"):
        requirements.check_settings(reference.guard, found)


def test_a_model_without_images_is_refused(
    engine: Any, reference: Reference, tmp_path: Path
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    small = tiny.llama(vocab_size=300, hidden_size=128, max_position_embeddings=512)
    small.save_pretrained(tmp_path)
    reference.loaded.processor.tokenizer.save_pretrained(tmp_path)
    given = EngineArgs(model=str(tmp_path), max_model_len=256, limit_mm_per_prompt={"image": 1})
    with pytest.raises(GuardError, match="takes no images"):
        given.create_engine_config()


def test_a_revision_of_a_folder_is_refused(engine: Any, reference: Reference) -> None:
    with pytest.raises(ModelError, match="only models on the hub have revisions"):
        config(reference, revision="v2")


def test_other_versions_are_refused() -> None:
    with pytest.raises(GuardError, match=r"0\.26\.0 is not supported"):
        requirements.check_version("0.26.0")
    requirements.check_version(requirements.SUPPORTED[0] + "+cpu")


def test_a_guard_of_every_position_is_refused(reference: Reference) -> None:
    made = tiny_vllm.guard(reference.loaded, [tiny.gate("vlm", 2)], positions="all", layers=[4])
    with pytest.raises(GuardError, match="all positions"):
        requirements.check_guard(made)


def test_another_decoder_is_refused(engine: Any, reference: Reference, runner: Any) -> None:
    from vlm_safeguard.engines.vllm.runner import decoder_layers

    model = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    with pytest.raises(GuardError, match="0 lists of 7 layers"):
        decoder_layers(model.model_runner.model, tiny.LAYERS + 1)


def ran(program: str, *arguments: str, guard: str | None = None) -> Any:
    """A program's process, with ``VLM_SAFEGUARD`` set to ``guard`` or unset, when it has ended."""
    own = {name: value for name, value in os.environ.items() if name != "VLM_SAFEGUARD"}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=own | ({} if guard is None else {"VLM_SAFEGUARD": guard}),
        capture_output=True,
        text=True,
    )


def test_another_version_stops_vllm(tmp_path: Path) -> None:
    program = (
        "import vllm; vllm.__version__ = '0.26.0';"
        "from vllm.plugins import load_general_plugins as load; load(); print('went on')"
    )
    ended = ran(program, guard=str(tmp_path))
    assert ended.returncode != 0
    assert "vLLM 0.26.0 is not supported" in ended.stderr
    assert "went on" not in ended.stdout


@pytest.mark.parametrize(
    ("name", "reason"),
    [("", "VLM_SAFEGUARD is empty"), ("no/such/guard/here", "cannot load the guard")],
)
def test_a_guard_that_cannot_be_loaded_stops_vllm(name: str, reason: str) -> None:
    program = "from vllm.plugins import load_general_plugins as load; load(); print('went on')"
    ended = ran(program, guard=name)
    assert ended.returncode != 0
    assert reason in ended.stderr
    assert "went on" not in ended.stdout


TWO_TRIES = """
import os, sys
from vllm.engine.arg_utils import EngineArgs
for guard in {guards}:
    os.environ.pop("VLM_SAFEGUARD", None)
    if guard:
        os.environ["VLM_SAFEGUARD"] = guard
    try:
        EngineArgs(model=sys.argv[1])
    except Exception as error:
        print(type(error).__name__)
    else:
        arming = sys.modules.get("vlm_safeguard.engines.vllm.arming")
        print(arming.armed() if arming else "bare")
"""
ARMED = str(("embedded", "enforce"))


@pytest.mark.parametrize(
    ("guards", "said"),
    [
        (["no/such/guard", "no/such/guard"], ["GuardError", "GuardError"]),
        (["no/such/guard", "embedded"], ["GuardError", ARMED]),
        (["", "embedded"], ["bare", ARMED]),
        (["", "no/such/guard"], ["bare", "GuardError"]),
        (["embedded", "no/such/guard"], [ARMED, "GuardError"]),
        (["embedded", ""], [ARMED, "GuardError"]),
    ],
)
def test_the_variable_counts_for_each_engine_of_a_process(
    guards: list[str], said: list[str], reference: Reference
) -> None:
    """vLLM asks its plugins once in a process, also where they fail."""
    ended = ran(TWO_TRIES.format(guards=guards), str(reference.folder))
    assert ended.stdout.split("\n")[-3:-1] == said, ended.stderr


def test_a_plugin_that_fails_before_ours_leaves_no_engine_unguarded() -> None:
    program = """
import importlib.metadata
from vllm.engine.arg_utils import EngineArgs

class Failing:
    name = "failing"
    value = "failing:fail"

    def load(self):
        def fail():
            raise RuntimeError("another plugin failed")
        return fail

every = importlib.metadata.entry_points
importlib.metadata.entry_points = lambda **given: [Failing(), *every(**given)]
for _ in range(2):
    try:
        EngineArgs(model="some/model")
    except Exception as error:
        print(type(error).__name__)
"""
    ended = ran(program, guard="no/such/guard")
    assert ended.stdout.split("\n")[-3:-1] == ["RuntimeError", "GuardError"], ended.stderr


def test_a_method_that_vllm_does_not_have_stops_it() -> None:
    from vlm_safeguard.engines.vllm.patching import replace

    with pytest.raises(GuardError, match="Other has no method: this version is not supported"):
        replace(type("Other", (), {}), "method", lambda own: own)


def test_without_a_guard_the_plugin_does_nothing() -> None:
    program = (
        "import sys; from vllm.plugins import load_general_plugins as load; load();"
        "print('vlm_safeguard.engines.vllm.arming' in sys.modules)"
    )
    ended = ran(program)
    assert ended.stdout.strip().endswith("False"), ended.stderr
