"""Arms the model runners of vLLM's workers, V1 and V2.

Each step: ``begin`` takes requests in, ``begin_forward`` says which row is whose, the layers run,
the logits come, ``end`` closes the books, and the reports leave with the sampled tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from vlm_safeguard.engines.vllm.messages import REPORT
from vlm_safeguard.engines.vllm.patching import refusal, replace
from vlm_safeguard.engines.vllm.requirements import check_graphs, check_settings
from vlm_safeguard.engines.vllm.runner import RunnerGuard
from vlm_safeguard.errors import GuardRuntimeError
from vlm_safeguard.guard import Guard

logger = logging.getLogger(__name__)

_GUARD = "_vlm_safeguard"  # on a model runner
_UNTRIED = (
    "the guard runs in vLLM's V2 model runner, which was only tested without a GPU. Set "
    "VLLM_USE_V2_MODEL_RUNNER=0 for V1, which ran all tests"
)
_CARRIED = ("_model_runner_output", "model_runner_output")


def arm_workers(guard: Guard, monitor: bool) -> None:
    """Arm the model runners; ``monitor``: gates decide, and nothing is steered."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as V2ModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    def load_model(own: Callable) -> Callable:
        @wraps(own)
        def guarded(self: Any, *args: Any, **kwargs: Any) -> None:
            from vllm.distributed import get_tensor_model_parallel_rank

            check_settings(guard, self.vllm_config)
            check_graphs(self.vllm_config)
            own(self, *args, **kwargs)
            if isinstance(self, V2ModelRunner):
                logger.warning(_UNTRIED)
            is_heard = get_tensor_model_parallel_rank() == 0
            setattr(self, _GUARD, RunnerGuard(guard, self.model, monitor, is_heard))

        return guarded

    def warm_up(own: Callable) -> Callable:
        @wraps(own)
        def guarded(self: Any) -> Any:
            with _of(self.model_runner).warming_up():
                return own(self)

        return guarded

    no_other_weights = refusal(
        GuardRuntimeError, "under a guard the model's weights cannot be changed"
    )
    replace(CPUModelRunner, "load_model", load_model)
    for runner in (GPUModelRunner, V2ModelRunner):
        replace(runner, "load_model", load_model)
        replace(runner, "reload_weights", no_other_weights)
    arm_v1(GPUModelRunner)
    arm_v2(V2ModelRunner)
    replace(Worker, "compile_or_warm_up_model", warm_up)


def arm_v1(runner: type) -> None:
    """Arm the steps of the V1 runner: it computes the logits in ``execute_model``."""

    def execute_model(own: Callable) -> Callable:
        @wraps(own)
        def guarded(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            guard = _of(self)
            guard.begin(scheduler_output)
            with _abandoning(guard):
                result = own(self, scheduler_output, *args, **kwargs)
                guard.end()
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

    replace(runner, "execute_model", execute_model)
    replace(runner, "_model_forward", model_forward)
    replace(runner, "sample_tokens", _sample_tokens)


def arm_v2(runner: type) -> None:
    """Arm the steps of the V2 runner: it computes the logits in ``sample``, which ``sample_tokens``
    calls.

    Its dummy runs do not come to ``prepare_inputs``; other warm-ups are made-up requests.
    """

    def execute_model(own: Callable) -> Callable:
        @wraps(own)
        def guarded(
            self: Any, scheduler_output: Any, intermediate_tensors: Any = None,
            dummy_run: bool = False, *args: Any, **kwargs: Any,
        ) -> Any:  # fmt: skip
            given = (scheduler_output, intermediate_tensors, dummy_run, *args)
            if dummy_run:  # nobody's tokens
                return own(self, *given, **kwargs)
            guard = _of(self)
            guard.begin(scheduler_output)
            with _abandoning(guard):
                return own(self, *given, **kwargs)

        return guarded

    def prepare_inputs(own: Callable) -> Callable:
        @wraps(own)
        def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
            batch = own(self, *args, **kwargs)
            _of(self).begin_forward(
                batch.req_ids, batch.query_start_loc_np, batch.num_computed_tokens_np
            )
            return batch

        return guarded

    def sample(own: Callable) -> Callable:
        @wraps(own)
        def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = own(self, *args, **kwargs)
            _of(self).end()
            return result

        return guarded

    replace(runner, "execute_model", execute_model)
    replace(runner, "prepare_inputs", prepare_inputs)
    replace(runner, "sample", sample)
    replace(runner, "sample_tokens", _sample_tokens)


def _sample_tokens(own: Callable) -> Callable:
    """Of both runners: the reports leave with the tokens."""

    @wraps(own)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        guard = _of(self)
        with _abandoning(guard):
            return _reporting(own(self, *args, **kwargs), guard)

    return guarded


@contextmanager
def _abandoning(guard: RunnerGuard) -> Iterator[None]:
    """Ends the guard's step where the runner's ends in an error."""
    try:
        yield
    except BaseException:
        guard.abandon()
        raise


def _reporting(result: Any, guard: RunnerGuard) -> Any:
    """The runner's output with the guard's reports in it."""
    reports = guard.take_reports()
    if reports:
        # An output that is still being copied carries the plain one in it: V1's, and V2's.
        carried = (getattr(result, name, None) for name in _CARRIED)
        setattr(next((one for one in carried if one is not None), result), REPORT, reports)
    return result


def _of(runner: Any) -> RunnerGuard:
    found = getattr(runner, _GUARD, None)
    if not isinstance(found, RunnerGuard):
        raise GuardRuntimeError("the model was loaded without the guard")
    return found
