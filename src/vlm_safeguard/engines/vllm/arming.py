"""Arms the guard in a process of vLLM: puts it into the classes that handle requests.

There is no other way in: vLLM has no extension point at its decoder layers. The classes are those
of the versions in ``requirements.SUPPORTED``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from vlm_safeguard.engines.vllm.arming_runners import arm_workers
from vlm_safeguard.engines.vllm.front_end import FrontEnd
from vlm_safeguard.engines.vllm.identity import check_model
from vlm_safeguard.engines.vllm.patching import refusal, replace
from vlm_safeguard.engines.vllm.requirements import (
    check_guard,
    check_settings,
    check_version,
    keep_operator,
)
from vlm_safeguard.engines.vllm.runner import guarded_layers
from vlm_safeguard.errors import GuardError, SafeguardError
from vlm_safeguard.guard import Guard

_MODES = ("enforce", "monitor")
_CHECKED = "_vlm_safeguard_checked"  # on an engine core
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
            raise GuardError(
                f"the guard {_armed[0][0]} is armed in this process already, in mode "
                f"{_armed[0][1]}: start another process"
            )
        return
    import vllm

    check_version(vllm.__version__)
    if not name.strip():
        raise GuardError("VLM_SAFEGUARD is empty: name a guard, or unset it")
    if mode not in _MODES:
        raise GuardError(f"unknown mode {mode!r} in VLM_SAFEGUARD_MODE: use {' or '.join(_MODES)}")
    guard, monitor = Guard.from_pretrained(name), mode == "monitor"
    check_guard(guard)
    _arm_configuration(guard, monitor)
    _arm_front_end(guard)
    _arm_engine_core(guard, monitor)
    arm_workers(guard, monitor)
    _armed.append((name, mode))


def check_unarmed() -> None:
    """Refuse to go on without a guard where one is armed.

    Raises:
        GuardError: names it.
    """
    if _armed:
        raise GuardError(
            f"the guard {_armed[0][0]} is armed in this process, and VLM_SAFEGUARD is unset: start "
            "another process for an engine without a guard"
        )


def armed() -> tuple[str, str] | None:
    """Name and mode of the guard of this process; None if there is none."""
    return _armed[0] if _armed else None


def _arm_configuration(guard: Guard, monitor: bool) -> None:
    from vllm.engine.arg_utils import EngineArgs

    layers = guarded_layers(guard, monitor)

    def create_engine_config(own: Callable) -> Callable:
        @wraps(own)
        def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.dtype == "auto":  # vLLM would take 16 bits for a model of 32
                self.dtype = guard.config.model.dtype or "auto"
            config = own(self, *args, **kwargs)
            check_settings(guard, config)
            keep_operator(config, layers)
            check_model(guard, config.model_config)
            return config

        return guarded

    replace(EngineArgs, "create_engine_config", create_engine_config)


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
        def guarded(self: Any, request_id: str, prompt: Any, *args: Any, **kwargs: Any) -> Any:
            with _Refusing():
                front_end.check_prompt(prompt)
            request = own(self, request_id, prompt, *args, **kwargs)
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

    no_beams = refusal(
        VLLMValidationError, "beam search is not guarded in vLLM: its beams are new prompts"
    )
    replace(BaseRenderer, "_process_multimodal", process_multimodal)
    replace(InputProcessor, "process_inputs", process_inputs)
    replace(OutputProcessor, "process_outputs", process_outputs)
    replace(RequestState, "make_request_output", make_request_output)
    replace(BeamSearchOfflineMixin, "beam_search", no_beams)
    replace(BeamSearchOnlineMixin, "beam_search", no_beams)


def _arm_engine_core(guard: Guard, monitor: bool) -> None:
    from vllm.config import SchedulerConfig
    from vllm.v1.engine import core

    begun: list[Any] = []  # the engine core that is being made

    def get_scheduler_cls(own: Callable) -> Callable:
        @wraps(own)
        def guarded_class(self: Any) -> Any:
            from vlm_safeguard.engines.vllm.scheduling import guarded

            return guarded(own(self))

        return guarded_class

    # A core in a process of its own is armed within its own `__init__`. So the check stands in what
    # that calls: a method in its midst, and a function at its end.
    def begin(own: Callable) -> Callable:
        @wraps(own)
        def guarded(self: Any) -> Any:
            begun[:] = [self]
            return own(self)

        return guarded

    def end(own: Callable) -> Callable:
        @wraps(own)
        def guarded() -> None:
            from vlm_safeguard.engines.vllm.self_check import check_engine

            if begun:
                made = begun.pop()
                check_engine(guard, made, monitor)
                setattr(made, _CHECKED, True)
            own()

        return guarded

    def serve(own: Callable) -> Callable:
        @wraps(own)
        def guarded(self: Any) -> Any:
            if not hasattr(self, _CHECKED):
                raise GuardError("the engine core was not checked before it takes requests")
            return own(self)

        return guarded

    replace(SchedulerConfig, "get_scheduler_cls", get_scheduler_cls)
    replace(core.EngineCore, "_initialize_effective_attention_block_size", begin)
    replace(core, "enable_envs_cache", end)
    for kind in (core.EngineCoreProc, core.DPEngineCoreProc):
        replace(kind, "run_busy_loop", serve)


class _Refusing:
    """Turns refusals into errors of the kind that vLLM's server answers with status 400."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from vllm.exceptions import VLLMValidationError

        if isinstance(error, SafeguardError):
            raise VLLMValidationError(str(error)) from error
