"""Answers an evaluation's requests in vLLM: in one process without a guard, in another under it.

vLLM takes its guard when it starts, so these cannot be one.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from typing import Any

from vlm_safeguard.calibration.generation import Response, gate_of
from vlm_safeguard.data.inputs import Query
from vlm_safeguard.engines.vllm.identity import load_processor
from vlm_safeguard.engines.vllm.llm import load_in_vllm
from vlm_safeguard.engines.vllm.messages import guard_digest
from vlm_safeguard.errors import ModelError, SafeguardError
from vlm_safeguard.evaluation.harness.workers import Batch
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.chat import single_turn, tokenize
from vlm_safeguard.model.fingerprint import dtype_name
from vlm_safeguard.model.load_options import LoadOptions
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.reasoning import decoded, may_reason

CONTEXT = 4096  # tokens of a prompt and its answer, at most
MEMORY = 0.4  # of a GPU, for each of two; the rest is for the model in transformers
PATIENCE = 20.0  # seconds in which a process ends by itself


class VllmPool:
    """Processes of vLLM, each started when it is first needed.

    Args:
        model: a folder or hub name.
        options: how it is loaded.
        loaded: the model in transformers, whose dtype vLLM takes.
        batch: requests that are answered together.

    Raises:
        ModelError: the model may reason before it answers.
        SafeguardError: vLLM is missing.
    """

    size = 1  # threads that may ask at once

    def __init__(self, model: str, options: LoadOptions, loaded: LoadedModel, batch: int) -> None:
        if find_spec("vllm") is None:
            raise SafeguardError("vLLM is missing: docs/vllm.md says how it is installed")
        if may_reason(loaded.processor):
            raise ModelError(
                "an evaluation in vLLM does not tell reasoning from answers: leave out --engine "
                "vllm for a model that reasons"
            )
        limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", CONTEXT)
        options = replace(options, dtype=dtype_name(loaded.model))
        self._arguments = model, options, min(CONTEXT, limit), batch
        self._started: dict[str, _Process] = {}
        self._closing, self._closed = Lock(), False
        self._guards = tempfile.TemporaryDirectory(prefix="vlm-safeguard-")

    def work(self, part: Batch) -> list[Response]:
        """One response for each request.

        Raises:
            SafeguardError: vLLM cannot be started, refuses a request, or has ended.
        """
        name = guard_digest(part.guard) if part.guard else ""
        with self._closing:
            if self._closed:
                raise SafeguardError("the evaluation was ended")
            if name not in self._started:
                self._started[name] = _Process(self._saved(part.guard, name), *self._arguments)
        return self._started[name].ask(part.queries, part.tokens)

    def _saved(self, guard: Guard | None, name: str) -> str | None:
        if guard is None:
            return None
        folder = Path(self._guards.name) / name
        guard.save_pretrained(folder)
        return str(folder)

    def close(self) -> None:
        """End the processes, also in the midst of an answer."""
        with self._closing:
            self._closed = True
        for process in self._started.values():
            process.close()
        self._guards.cleanup()


class _Process:
    """vLLM in a process of its own. ``arguments`` as in ``_Responder``."""

    def __init__(self, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")  # vLLM starts threads
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, *arguments))
        self._process.start()
        there.close()  # else its end would not be noticed

    def ask(self, queries: Sequence[Query], tokens: int) -> list[Response]:
        try:
            self._here.send((queries, tokens))
            found: list[Response] | SafeguardError = self._here.recv()
        except (EOFError, OSError) as error:
            raise SafeguardError("the process of vLLM ended: its messages say why") from error
        if isinstance(found, SafeguardError):
            raise found
        return found

    def close(self) -> None:
        self._process.terminate()
        self._process.join(PATIENCE)
        if (group := self._process.pid) is not None:  # what vLLM started may outlive it
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self._here.close()


def _serve(asked: Connection, *arguments: Any) -> None:
    """What such a process does: answer until nobody asks any more."""
    os.setsid()  # a group of its own, with all that vLLM starts, so that all can be ended
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        _answer(asked, *arguments)
    finally:
        # A process of multiprocessing skips the exit handlers that vLLM relies on.
        for child in multiprocessing.active_children():
            child.terminate()


def _answer(asked: Connection, *arguments: Any) -> None:
    responder: _Responder | SafeguardError
    try:
        responder = _Responder(*arguments)
    except Exception as error:
        responder = _plain(error)  # the answer to every request
    while True:
        try:
            queries, tokens = asked.recv()
        except EOFError:
            return
        found: list[Response] | SafeguardError
        if isinstance(responder, SafeguardError):
            found = responder
        else:
            try:
                found = responder.respond(queries, tokens)
            except Exception as error:
                found = _plain(error)
        asked.send(found)


def _plain(error: Exception) -> SafeguardError:
    """An error that can be sent to another process; not every type can."""
    return SafeguardError(str(error) or type(error).__name__)


class _Responder:
    """``calibration.generation.respond``, in vLLM.

    Args:
        guard: folder of the guard, or None.
        model: a folder or hub name.
        options: how it is loaded.
        context: tokens of a prompt and its answer, at most.
        batch: requests that are answered together.
    """

    def __init__(
        self, guard: str | None, model: str, options: LoadOptions, context: int, batch: int
    ) -> None:
        self._gates = Guard.from_pretrained(guard).config.gates if guard else []
        self._llm = load_in_vllm(
            model, guard, options=options, max_len=context, batch=batch, memory=MEMORY
        )
        config = self._llm.llm_engine.model_config
        self._processor = load_processor(config)
        # transformers applies it to greedy answers too.
        self._penalty = config.get_diff_sampling_param().get("repetition_penalty", 1.0)

    def respond(self, queries: Sequence[Query], tokens: int) -> list[Response]:
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=tokens,
            temperature=0.0,
            repetition_penalty=self._penalty,
            detokenize=False,
        )
        outputs = self._llm.generate([self._prompt(one) for one in queries], params, use_tqdm=False)
        return [self._response(output) for output in outputs]

    def _prompt(self, query: Query) -> dict[str, Any]:
        ids, images = tokenize(self._processor, single_turn(query.text, query.image))
        media = {"multi_modal_data": {"image": images}} if images else {}
        return {"prompt_token_ids": ids, **media}

    def _response(self, output: Any) -> Response:
        """
        Raises:
            GuardRuntimeError: the guard blocked the request.
        """
        from vlm_safeguard.engines.vllm.front_end import decisions

        decision = decisions(output)[0] if self._gates else None
        answer = output.outputs[0]
        said, ended = list(answer.token_ids), answer.finish_reason == "stop"
        said = said[:-1] if ended else said  # without the token that ends it
        text, first = decoded(self._processor.tokenizer, said), said[0] if said else -1
        return Response(text, len(said), not ended, *gate_of(decision, self._gates), first)
