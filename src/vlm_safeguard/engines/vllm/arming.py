"""Arms the guard in a process of vLLM: puts it into the classes that handle requests.

There is no other way in: vLLM has no extension point at its decoder layers. The classes are those
of the versions in ``requirements.SUPPORTED``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from vlm_safeguard.engines.vllm.front_end import FrontEnd
from vlm_safeguard.engines.vllm.identity import check_model
from vlm_safeguard.engines.vllm.messages import REPORT
from vlm_safeguard.engines.vllm.requirements import (
    check_eager,
    check_guard,
    check_settings,
    check_version,
    run_eagerly,
)
from vlm_safeguard.engines.vllm.runner import RunnerGuard
from vlm_safeguard.errors import GuardError, GuardRuntimeError, SafeguardError
from vlm_safeguard.guard import Guard

_GUARD = "_vlm_safeguard"  # on a model runner
_MODES = ("enforce", "monitor")
_armed: list[tuple[str, str]] = []


def arm(name: str, mode: str = "enforce") -> None:
    """Arm a guard in this process; once, however often it is called.

    Args:
        name: of the guard: a folder, a repository on the hub, or "embedded".
        mode: "enforce", or "monitor": gates are read and counted, and nothing changes.

    Raises:
        GuardError: the guard cannot be loaded or used, the mode is unknown, or this version of vLLM
            is not supported.
    """
    if _armed:
        if _armed != [(name, mode)]:
            raise GuardError(f"the guard {_armed[0][0]} is armed in this process already")
        return
    import vllm

    check_version(vllm.__version__)
    if not name.strip():
        raise GuardError("VLM_SAFEGUARD is empty: name a guard, or unset it")
    if mode not in _MODES:
        raise GuardError(f"unknown mode {mode!r} in VLM_SAFEGUARD_MODE: use {' or '.join(_MODES)}")
    guard, monitor = Guard.from_pretrained(name), mode == "monitor"
    check_guard(guard)
    _arm_configuration(guard)
    _arm_front_end(guard)
    _arm_engine_core(guard, monitor)
    _arm_workers(guard, monitor)
    _armed.append((name, mode))


def armed() -> tuple[str, str] | None:
    """Name and mode of the guard of this process; None if there is none."""
    return _armed[0] if _armed else None


def _arm_configuration(guard: Guard) -> None:
    from vllm.engine.arg_utils import EngineArgs

    def create_engine_config(own: Callable) -> Callable:
        @wraps(own)
        def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.dtype == "auto":  # vLLM would take 16 bits for a model of 32
                self.dtype = guard.config.model.dtype or "auto"
            config = own(self, *args, **kwargs)
            check_settings(guard, config)
            run_eagerly(config)
            check_model(guard, config.model_config)
            return config

        return guarded

    _replace(EngineArgs, "create_engine_config", create_engine_config)


def _arm_front_end(guard: Guard) -> None:
    from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
    from vllm.exceptions import VLLMValidationError
    from vllm.renderers.base import BaseRenderer
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState

    front_end = FrontEnd(guard)

    def process_multimodal(own: Callable) -> Callable:
        @wraps(own)
        def guarded(
            self: Any, prompt: Any, mm_data: Any, mm_uuids: Any, *args: Any, **kw: Any
        ) -> Any:
            with _Refusing():
                media, words = front_end.look_at(mm_data, mm_uuids)
            processed = own(self, prompt, media, mm_uuids, *args, **kw)
            front_end.keep(processed, words)
            return processed

        return guarded

    def process_inputs(own: Callable) -> Callable:
        @wraps(own)
        def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
            request = own(self, *args, **kwargs)
            with _Refusing():
                front_end.order(request, self.model_config)
            return request

        return guarded

    def process_outputs(own: Callable) -> Callable:
        @wraps(own)
        def guarded(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
            front_end.let_out(engine_core_outputs, self.request_states)
            return own(self, engine_core_outputs, *args, **kwargs)

        return guarded

    def make_request_output(own: Callable) -> Callable:
        @wraps(own)
        def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
            output = own(self, *args, **kwargs)
            front_end.mark(self, output)
            return output

        return guarded

    no_beams = _refusal(
        VLLMValidationError, "beam search is not guarded in vLLM: its beams are new prompts"
    )
    _replace(BaseRenderer, "_process_multimodal", process_multimodal)
    _replace(InputProcessor, "process_inputs", process_inputs)
    _replace(OutputProcessor, "process_outputs", process_outputs)
    _replace(RequestState, "make_request_output", make_request_output)
    _replace(BeamSearchOfflineMixin, "beam_search", no_beams)
    _replace(BeamSearchOnlineMixin, "beam_search", no_beams)


def _arm_engine_core(guard: Guard, monitor: bool) -> None:
    from vllm.config import SchedulerConfig
    from vllm.v1.engine.core import EngineCore

    def get_scheduler_cls(own: Callable) -> Callable:
        @wraps(own)
        def guarded_class(self: Any) -> Any:
            from vlm_safeguard.engines.vllm.scheduling import guarded

            return guarded(own(self))

        return guarded_class

    def start(own: Callable) -> Callable:
        @wraps(own)
        def guarded(self: Any, *args: Any, **kwargs: Any) -> None:
            from vlm_safeguard.engines.vllm.self_check import check_engine

            own(self, *args, **kwargs)
            check_engine(guard, self, monitor)

        return guarded

    _replace(SchedulerConfig, "get_scheduler_cls", get_scheduler_cls)
    _replace(EngineCore, "__init__", start)


def _arm_workers(guard: Guard, monitor: bool) -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as V2ModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def load_model(own: Callable) -> Callable:
        @wraps(own)
        def guarded(self: Any, *args: Any, **kwargs: Any) -> None:
            from vllm.distributed import get_tensor_model_parallel_rank

            check_settings(guard, self.vllm_config)
            check_eager(self.vllm_config)
            own(self, *args, **kwargs)
            is_heard = get_tensor_model_parallel_rank() == 0
            setattr(self, _GUARD, RunnerGuard(guard, self.model, monitor, is_heard))

        return guarded

    def execute_model(own: Callable) -> Callable:
        @wraps(own)
        def guarded(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            runner = _of(self)
            runner.begin(scheduler_output)
            try:
                result = own(self, scheduler_output, *args, **kwargs)
                runner.end()
            except BaseException:
                runner.abandon()
                raise
            return result

        return guarded

    def model_forward(own: Callable) -> Callable:
        @wraps(own)
        def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
            batch = self.input_batch
            _of(self).begin_forward(
                batch.req_ids[: batch.num_reqs],
                self.query_start_loc.np,
                batch.num_computed_tokens_cpu,
            )
            return own(self, *args, **kwargs)

        return guarded

    def sample_tokens(own: Callable) -> Callable:
        @wraps(own)
        def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = own(self, *args, **kwargs)
            reports = _of(self).take_reports()
            if reports:  # an output that is still being copied carries the plain one in it
                setattr(getattr(result, "_model_runner_output", result), REPORT, reports)
            return result

        return guarded

    no_other_weights = _refusal(
        GuardRuntimeError, "under a guard the model's weights cannot be changed"
    )
    no_v2 = _refusal(
        GuardError, "the guard runs in vLLM's V1 model runner: set VLLM_USE_V2_MODEL_RUNNER=0"
    )
    _replace(GPUModelRunner, "load_model", load_model)
    _replace(CPUModelRunner, "load_model", load_model)
    _replace(GPUModelRunner, "execute_model", execute_model)
    _replace(GPUModelRunner, "_model_forward", model_forward)
    _replace(GPUModelRunner, "sample_tokens", sample_tokens)
    _replace(GPUModelRunner, "reload_weights", no_other_weights)
    _replace(V2ModelRunner, "load_model", no_v2)


def _of(runner: Any) -> RunnerGuard:
    found = getattr(runner, _GUARD, None)
    if not isinstance(found, RunnerGuard):
        raise GuardRuntimeError("the model was loaded without the guard")
    return found


def _replace(owner: type, name: str, make: Callable[[Callable], Callable]) -> None:
    """Put what ``make`` makes of a class's own method in its place.

    Raises:
        GuardError: the class has no such method.
    """
    if name not in vars(owner):
        raise GuardError(f"vLLM's {owner.__name__} has no {name}: this version is not supported")
    setattr(owner, name, make(vars(owner)[name]))


def _refusal(kind: type[Exception], reason: str) -> Callable[[Callable], Callable]:
    """For ``_replace``: what makes a method refuse every call."""

    def make(own: Callable) -> Callable:
        @wraps(own)
        def refused(*args: Any, **kwargs: Any) -> None:
            raise kind(reason)

        return refused

    return make


class _Refusing:
    """Turns refusals into errors of the kind that vLLM's server answers with status 400."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from vllm.exceptions import VLLMValidationError

        if isinstance(error, SafeguardError):
            raise VLLMValidationError(str(error)) from error
