"""vLLM engines for `bench.vllm_speed`, each in a process of its own.

A guard is armed for a whole process, so variants cannot share one. Engines that are compared answer
in lockstep: each waits in front of each of its steps until it is its turn, so that a machine that
slows down slows all of them down.

Two processes that do the same work differ in speed by several percent, as their memory happens to
lie. So an engine can also take its guard off and put it on again, and engines change roles.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}


@dataclass(frozen=True)
class Variant:
    """How an engine is started.

    Attributes:
        name: in the table.
        compiled: whether vLLM compiles the model; else it runs eagerly.
        guard: the guard's folder; None starts the engine without a guard.
        lens: the folder where vllm-lens is installed; None leaves it out. It adds a vector after
            ``layers``, at every token.
    """

    name: str
    compiled: bool = False
    guard: Path | None = None
    lens: Path | None = None
    layers: Sequence[int] = ()


@dataclass(frozen=True)
class Answers:
    """What an engine answered to requests that came all at once.

    Attributes:
        turns: seconds of each of its own turns: taking in the prompts, then each step.
        prompts: tokens of each prompt.
        tokens: token ids of each answer.
        scores: of the guard's first gate, for each request and layer; none without a guard.
        opened: requests on which a gate opened.
    """

    turns: list[float]
    prompts: list[int]
    tokens: list[list[int]]
    scores: list[list[float]]
    opened: int

    @property
    def seconds(self) -> float:
        """From taking in the prompts to the last token."""
        return sum(self.turns)


class Engine:
    """An engine that runs in another process."""

    def __init__(self, name: str, connection: Connection) -> None:
        self.name, self._connection = name, connection

    def ask(self, prompts: Sequence[str], tokens: int, picture: bool, guarded: bool) -> None:
        """See ``in_lockstep``. The engine does nothing before its first turn."""
        self._connection.send((list(prompts), tokens, picture, guarded))

    def turn(self) -> Answers | None:
        """Let it take the prompts in, or make a step; the answers if that was the last one."""
        self._connection.send("go")
        answers: Answers | None = self.heard()
        return answers

    def heard(self) -> Any:
        """What the process says next.

        Raises:
            RuntimeError: it has ended. Its own error is on stderr.
        """
        try:
            return self._connection.recv()
        except EOFError:
            raise RuntimeError(f"the engine `{self.name}` has ended: see above") from None


def in_lockstep(
    engines: Sequence[Engine],
    prompts: Sequence[str],
    tokens: int,
    picture: bool = True,
    bare: Engine | None = None,
) -> list[Answers]:
    """The answers of each engine to prompts that come all at once.

    Args:
        engines: in the order in which they take their turns.
        prompts: rendered.
        tokens: of each answer, which is greedy and does not end before.
        picture: whether a blank picture comes with each prompt.
        bare: an engine that answers without its guard.
    """
    found: dict[Engine, Answers] = {}
    for engine in engines:
        engine.ask(prompts, tokens, picture, engine is not bare)
    while len(found) < len(engines):
        for engine in engines:
            if engine not in found and (answers := engine.turn()) is not None:
                found[engine] = answers
    return [found[engine] for engine in engines]


@contextmanager
def running(variant: Variant, model: Path) -> Iterator[Engine]:
    """An engine on the model in a folder."""
    context = multiprocessing.get_context("spawn")
    own, its = context.Pipe()
    process = context.Process(target=_serve, args=(variant, model, its), daemon=True)
    process.start()
    its.close()  # so that its end is noticed
    engine = Engine(variant.name, own)
    try:
        engine.heard()
        yield engine
    finally:
        own.close()
        process.join(30)
        process.kill()


def _serve(variant: Variant, model: Path, connection: Connection) -> None:
    """Answer until the other side closes the connection."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | _QUIET
    os.environ.pop("VLM_SAFEGUARD", None)
    switch = Switch()
    if variant.guard is not None:
        switch.record()
        os.environ["VLM_SAFEGUARD"] = str(variant.guard)
    if variant.lens is not None:
        sys.path.insert(0, str(variant.lens))  # vLLM finds the plugin there
    from vllm import LLM
    from vllm.config import CompilationMode

    llm = LLM(
        model=str(model),
        dtype="float32",
        enforce_eager=not variant.compiled,
        # Else every round after the first would find its prompts computed.
        enable_prefix_caching=False,
        max_model_len=512,
        seed=0,
    )
    compiles = llm.llm_engine.vllm_config.compilation_config.mode != CompilationMode.NONE
    if compiles != variant.compiled:
        raise RuntimeError(f"vLLM {'compiles' if compiles else 'does not compile'} the model")
    clock = _Clock(connection)
    own_step = llm.llm_engine.step

    def step() -> Any:
        clock.stop()
        connection.send(None)
        clock.start()
        return own_step()

    llm.llm_engine.step = step
    if variant.guard is not None:
        switch.find(llm)
    connection.send("ready")
    with suppress(EOFError):
        while True:
            prompts, tokens, picture, guarded = connection.recv()
            switch.turn(guarded)
            guarded = guarded and variant.guard is not None
            connection.send(_answer(llm, variant, clock, prompts, tokens, picture, guarded))


class _Nothing:
    """Stands in the place of what the guard adds to vLLM's scheduler."""


class Switch:
    """Takes the guard of this process off and puts it on again, between requests.

    In a compiled model its operator stays, and does nothing then.
    """

    def __init__(self) -> None:
        self._methods: list[tuple[Any, str, Any, Any]] = []  # vLLM's own, and the guard's
        self._hooks: list[tuple[dict, dict]] = []  # of each module: those in use, and all
        self._scheduler: Any = None
        self._classes: tuple[type, type] = object, object  # of the scheduler, likewise
        self._model: Any = None
        self._logits: Any = None
        self._on = True

    def record(self) -> None:
        """Note from now on what the guard puts in the place of vLLM's methods."""
        from vlm_safeguard.engines.vllm import patching

        own_replace = patching.replace

        def replace(owner: Any, name: str, make: Any) -> None:
            own = vars(owner)[name]
            own_replace(owner, name, make)
            self._methods.append((owner, name, own, vars(owner)[name]))

        patching.replace = replace

    def find(self, llm: Any) -> None:
        """Find the guard's parts of an engine in this process."""
        from vlm_safeguard.engines.vllm import layer_operator

        core = llm.llm_engine.engine_core.engine_core
        self._scheduler = core.scheduler
        guarded = type(core.scheduler)
        # An object may change to a class of the same layout only: one with as many bases.
        bare = type("Bare", (_Nothing, guarded.__bases__[-1]), {})
        self._classes = bare, guarded
        self._model = core.model_executor.driver_worker.worker.model_runner.model
        self._logits = vars(self._model)["compute_logits"]
        for module in self._model.modules():
            hooks = module._forward_hooks
            on_layer = any(
                getattr(hook, "func", None) is layer_operator.show for hook in hooks.values()
            )
            if on_layer or module is self._model:  # which has no other hook than the guard's
                self._hooks.append((hooks, dict(hooks)))

    def turn(self, on: bool) -> None:
        """Put the guard on, or take it off."""
        if on == self._on or self._scheduler is None:
            return
        self._on = on
        for owner, name, own, guarded in self._methods:
            setattr(owner, name, guarded if on else own)
        self._scheduler.__class__ = self._classes[on]
        vars(self._model).pop("compute_logits", None)
        if on:
            vars(self._model)["compute_logits"] = self._logits
        for used, every in self._hooks:
            used.clear()
            used.update(every if on else {})


class _Clock:
    """Takes the time of an engine's own turns."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._since, self.turns = 0.0, list[float]()

    def start(self) -> None:
        """Wait for a turn."""
        self._connection.recv()
        self._since = time.perf_counter()

    def stop(self) -> None:
        """A turn is over."""
        self.turns.append(time.perf_counter() - self._since)


def _answer(
    llm: Any,
    variant: Variant,
    clock: _Clock,
    texts: list[str],
    tokens: int,
    picture: bool,
    guarded: bool,
) -> Answers:
    from vllm import SamplingParams

    from vlm_safeguard.data import drawings
    from vlm_safeguard.engines.vllm.front_end import decisions, is_decided

    extra = {} if variant.lens is None else {"apply_steering_vectors": [_vector(llm, variant)]}
    params = SamplingParams(
        temperature=0.0, max_tokens=tokens, ignore_eos=True, extra_args=extra or None
    )
    media = {"multi_modal_data": {"image": drawings.blank()}} if picture else {}
    prompts = [{"prompt": text, **media} for text in texts]
    gc.collect()
    clock.turns = []
    clock.start()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    clock.stop()
    if not guarded and any(is_decided(output) for output in outputs):
        raise RuntimeError("the guard was not taken off")
    decided = [decisions(output)[0] for output in outputs] if guarded else []
    answered = [list(output.outputs[0].token_ids) for output in outputs]
    if any(len(ids) != tokens for ids in answered):
        raise RuntimeError("an answer has another length than it was asked for")
    return Answers(
        clock.turns,
        [len(output.prompt_token_ids) for output in outputs],
        answered,
        [next(iter(decision.parts.values())) for decision in decided],
        sum(decision.fired for decision in decided),
    )


def _vector(llm: Any, variant: Variant) -> Any:
    """The vector of vllm-lens, large enough that answers change."""
    import torch
    from vllm_lens import SteeringVector

    width = llm.model_config.get_hidden_size()
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(len(variant.layers), width, generator=generator)
    return SteeringVector(activations=vectors, layer_indices=list(variant.layers))
