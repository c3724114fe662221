"""Guards one model runner of vLLM: hooks its decoder and maps batch rows to requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from vlm_safeguard.engines.vllm import layer_operator
from vlm_safeguard.engines.vllm.messages import Report, Role, guard_digest, role_of
from vlm_safeguard.engines.vllm.step import BatchRow, Step
from vlm_safeguard.engines.vllm.watched import Texts, Watched
from vlm_safeguard.engines.vllm.word_sums import WordSums
from vlm_safeguard.errors import GuardError, GuardRuntimeError
from vlm_safeguard.guard import Guard
from vlm_safeguard.runtime.gate import Gates
from vlm_safeguard.runtime.request import Request
from vlm_safeguard.runtime.steering import NoSteering, Steerer

# Methods of vLLM's models.
_LOGITS, _LANGUAGE = "compute_logits", "get_language_model"


class RunnerGuard:
    """A guard on the model of one worker.

    ``watched``: the state of each request, from its first step until it has ended.
    """

    def __init__(
        self, guard: Guard, model: nn.Module, monitor: bool = False, is_heard: bool = True
    ) -> None:
        """Hook the model.

        Args:
            guard: the guard.
            model: vLLM's.
            monitor: gates decide, and nothing is steered.
            is_heard: whether the engine core hears this worker's reports: of several ranks, it
                hears one.

        Raises:
            GuardError: the decoder is not found, or has other layers than the guard's model.
        """
        config = guard.config
        self._config, self._digest = config, guard_digest(guard)
        self._gates, self._steerer, self._layers = _parts(guard, monitor)
        self.watched: dict[str, Watched] = {}
        self._texts = Texts()
        self._serving, self._is_heard, self._warming_up = False, is_heard, False
        self._step: Step | None = None
        self._reports: dict[str, Report] = {}
        layers = decoder_layers(model, config.model.layers)
        self._handles = [
            layers[layer].register_forward_hook(partial(layer_operator.show, number=layer))
            for layer in self._layers
        ]
        self._watch_head(model)

    # -- one step of the runner --------------------------------------------------------------------

    def begin(self, scheduled: Any) -> None:
        """A step of the runner begins.

        ``scheduled``: vLLM's ``SchedulerOutput``. Requests that have ended are forgotten, new ones
        taken in.

        Raises:
            GuardRuntimeError: a request came past the guarded engine core.
        """
        self._reports = {}
        self._run(None)
        if self._warming_up:
            return
        for request_id in scheduled.finished_req_ids:
            self.watched.pop(request_id, None)
            self._texts.forget(request_id)
        for new in scheduled.scheduled_new_reqs:
            if new.req_id in self.watched:  # the V2 runner takes preempted requests in again
                continue
            role, width = role_of(new.sampling_params), len(new.prompt_token_ids or ())
            self.watched[new.req_id] = self._watch(new.req_id, role, width)
        self._serving = scheduled.total_num_scheduled_tokens > 0

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """Steps in here are on requests that vLLM makes up before it takes any: they have no gates.

        Raises:
            GuardRuntimeError: it has taken some.
        """
        if self.watched:
            raise GuardRuntimeError("vLLM warms up while it serves requests")
        self._warming_up = True
        try:
            yield
        finally:
            self._warming_up = False

    def end(self) -> None:
        """The step of the runner has run its model.

        Raises:
            GuardRuntimeError: the model did not run under guard, or a request failed on a worker
                that nobody hears.
        """
        serving, step = self._serving, self._step
        self._serving = False
        self._run(None)
        if not serving:
            return
        if step is None:
            raise GuardRuntimeError("the model ran outside of the guarded forward pass")
        if not step.read:
            raise GuardRuntimeError("the logits came past the guard")
        for watched in step.finish():
            if watched.failed and not self._is_heard:
                raise GuardRuntimeError(watched.failed)
            if watched.is_text and not watched.failed:
                self._texts.keep(watched)
            self._reports[watched.name] = watched.report()

    def abandon(self) -> None:
        """The step of the runner ended in an error."""
        self._serving, self._reports = False, {}
        self._run(None)

    def take_reports(self) -> dict[str, Report]:
        """What was decided in this step, by request."""
        found, self._reports = self._reports, {}
        return found

    def begin_forward(self, ids: list[str], starts: Any, computed: Any) -> None:
        """The model is about to run on the flattened batch.

        Args:
            ids: of the requests in it, in order.
            starts: the first token of each, and the end of the last.
            computed: the columns of each request that earlier steps have computed.
        """
        if not self._serving:  # a warm-up: nobody's tokens
            return
        rows = [
            BatchRow(
                self.watched[name],
                number,
                int(starts[number]),
                range(
                    int(computed[number]),
                    int(computed[number]) + int(starts[number + 1]) - int(starts[number]),
                ),
            )
            for number, name in enumerate(ids)
        ]
        probe = len(self._config.probe)
        self._run(Step(rows, self._layers, self._gates, self._steerer, probe))

    def _run(self, step: Step | None) -> None:
        self._step = step
        layer_operator.run(step)

    # -- set-up ------------------------------------------------------------------------------------

    def _watch(self, name: str, role: Role, width: int) -> Watched:
        if not role.reads_for:
            request, failed = self._fresh(width, role), ""
            if role.form:
                try:
                    request = self._texts.take(name, role.form)
                except GuardRuntimeError as error:
                    failed = str(error)
            watched = Watched(name, role, request, width, failed=failed)
        else:
            frame = self._config.frame
            words = WordSums(width, frame) if frame is not None else None
            watched = Watched(name, role, self._fresh(role.width, role), width, words)
        if role.guard != self._digest:
            watched.fail("this worker has another guard than the front end")
        return watched

    def _fresh(self, width: int, role: Role) -> Request:
        row, none = frozenset([0]), frozenset[int]()
        return Request(
            self._config.gates,
            width,
            [width - 1],
            [0],
            wordless=row if role.wordless else none,
            verdictless=none if role.judged else row,
        )

    def _watch_head(self, model: nn.Module) -> None:
        own: Callable[..., Tensor | None] = getattr(model, _LOGITS)

        def compute_logits(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
            logits = own(hidden_states, *args, **kwargs)
            if self._step is not None:
                self._step.read_logits(hidden_states, logits)
            return logits

        def see(_: nn.Module, __: Any, output: Any) -> None:
            if self._step is not None:
                self._step.read_states(output[0] if isinstance(output, tuple) else output, own)

        setattr(model, _LOGITS, compute_logits)
        model.register_forward_hook(see)


def guarded_layers(guard: Guard, monitor: bool) -> list[int]:
    """The layers that show a guard their output; ``monitor`` as in ``RunnerGuard``."""
    return _parts(guard, monitor)[2]


def _parts(guard: Guard, monitor: bool) -> tuple[Gates, Steerer, list[int]]:
    """A guard's gates, its steering, and the layers that either needs."""
    gates = Gates(guard.config.gates, guard.tensors)
    make = NoSteering if monitor else Steerer
    steerer = make(guard.config.steering, guard.tensors, bool(gates.layers("text")))
    return gates, steerer, sorted(gates.layers("text") | gates.layers("vlm") | steerer.layers)


def decoder_layers(model: nn.Module, count: int) -> nn.ModuleList:
    """The layers of the language decoder of vLLM's model.

    Raises:
        GuardError: not exactly one list of ``count`` layers is found in its language model, or some
            layers are on another rank.
    """
    if not hasattr(model, _LANGUAGE):
        raise GuardError(
            f"{type(model).__name__} is no VLM of vLLM's whose language model is known"
        )
    language: nn.Module = getattr(model, _LANGUAGE)()
    found = [
        module
        for module in language.modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if len(found) != 1:
        raise GuardError(
            f"cannot verify the decoder of {type(model).__name__}: {len(found)} lists of {count} "
            "layers in its language model"
        )
    if any(not list(layer.parameters()) for layer in found[0]):
        raise GuardError("some decoder layers are on another rank: use tensor parallelism only")
    return found[0]
