"""The inference thread of vLLM: requests join and leave its batch token by token.

vLLM was started under the guard (``engines.vllm``), which decides in it. This thread hands requests
in, sends their answers on, and asks a harmful question now and then. Where vLLM itself fails, the
thread ends, and with it the server's health.
"""

from __future__ import annotations

import itertools
import logging
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from vlm_safeguard.data.prompts import anchors
from vlm_safeguard.engines.vllm.front_end import decisions
from vlm_safeguard.engines.vllm.identity import load_processor
from vlm_safeguard.errors import (
    GuardRuntimeError,
    ImageError,
    ModelError,
    PromptTooLong,
    UnreadableText,
)
from vlm_safeguard.model.chat import takes_system, tokenize
from vlm_safeguard.server import http_errors
from vlm_safeguard.server.conversation import Conversation, Takes
from vlm_safeguard.server.http_errors import RequestError
from vlm_safeguard.server.inference_thread import InferenceThread
from vlm_safeguard.server.job import Begun, Event, Failed, Job, Pictures, Sampling
from vlm_safeguard.server.one_answer import OneAnswer
from vlm_safeguard.server.picture_count import count, marker_of
from vlm_safeguard.server.settings import Settings
from vlm_safeguard.server.telemetry import Telemetry

logger = logging.getLogger(__name__)
CANDIDATES = 32  # harmful anchors that are asked until a gate opens


@dataclass
class _Running:
    answer: OneAnswer
    pictures: Pictures


class VllmEngine(InferenceThread):
    """Answers ``Job``s through vLLM.

    Args:
        llm: a ``vllm.LLM`` that was started under a guard, see ``load_in_vllm``. The engine is its
            only user from now on.
        reads_pictures: whether the guard reads the words in pictures.
        settings: mode and limits.
        telemetry: where counts go.
    """

    def __init__(
        self, llm: Any, reads_pictures: bool, settings: Settings, telemetry: Telemetry
    ) -> None:
        self._vllm = llm.llm_engine
        model_config = self._vllm.model_config
        self._processor = load_processor(model_config)
        takes = Takes(takes_system(self._processor), reads_pictures)
        super().__init__(settings, telemetry, takes)
        self._marker = marker_of(self._processor)
        # transformers applies it to greedy answers too, and the guard was calibrated on those.
        defaults = model_config.get_diff_sampling_param()
        self._penalty = defaults.get("repetition_penalty", 1.0)
        self._ids = itertools.count()
        self._running: dict[str, _Running] = {}
        self._question = ""

    def close(self) -> None:
        """Finish what was begun, fail what waits, and end the thread and vLLM."""
        super().close()
        self._vllm.engine_core.shutdown()

    # -- the inference thread --------------------------------------------------------------------

    def _serve(self) -> None:
        self._choose_question()
        self._started()
        while not self._closing or self._running:
            self._take()
            if self._running:
                self._step()
            if time.monotonic() > self._due:
                opened = self._opens()  # an error of vLLM ends the thread
                self._check(partial(self._require, opened))
                if not self.ready.is_set():
                    self._withhold()

    def _take(self) -> None:
        """Hand requests to vLLM while it has room. Waits for one if it has none."""
        with self._changed:
            if not self._running:
                self._changed.wait_for(lambda: self._waiting or self._closing, self._pause())
            taken: list[Job] = []
            while self._waiting and not self._closing and self._has_room(len(taken)):
                taken.append(self._waiting.popleft())
            self._taken += taken
            self.telemetry.queue.set(len(self._waiting))
        for job in taken:
            self._add(job)

    def _has_room(self, taken: int) -> bool:
        return len(self._running) + taken < self.settings.batch

    def _add(self, job: Job) -> None:
        if job.unwanted:
            self._end(job, http_errors.too_late())
            return
        try:
            self._hand_in(job)
        except RequestError as error:
            self._end(job, error)
        except Exception as error:
            # Without the message: it may quote the request.
            logger.error("a request failed", extra={"error": type(error).__name__})
            self._end(job, http_errors.failed())

    def _hand_in(self, job: Job) -> None:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError
        from vllm.sampling_params import RequestOutputKind

        sampling, name = job.sampling, str(next(self._ids))
        params = SamplingParams(
            max_tokens=1 if job.gates_only else sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            repetition_penalty=self._penalty,
            output_kind=RequestOutputKind.DELTA,
            detokenize=False,
        )
        try:
            ids, images = tokenize(self._processor, job.conversation.messages)
            self._check_length(len(ids))
            pictures = count(self._processor, self._marker, job)
            media = {"multi_modal_data": {"image": images}} if images else {}
            [prompt] = self._vllm.renderer.render_cmpl([{"prompt_token_ids": ids, **media}])
            # With its pictures it may be longer than vLLM's context, which it refuses as any fault.
            self._check_length(len(prompt["prompt_token_ids"]))
            if len(prompt.get("mm_placeholders", {}).get("image", ())) != pictures.sent:
                raise http_errors.image_lost()
            self._vllm.add_request(name, prompt, params)
        except VLLMValidationError as error:
            if isinstance(error.__cause__, UnreadableText):
                raise http_errors.unreadable() from None
            if isinstance(error.__cause__, PromptTooLong):
                raise http_errors.no_room(error.__cause__) from None
            raise http_errors.unusable() from None
        except (ModelError, ImageError):  # their texts quote the request and the library
            raise http_errors.unusable() from None
        answer = OneAnswer(job, self.settings, self._processor.tokenizer)
        self._running[name] = _Running(answer, pictures)

    def _check_length(self, tokens: int) -> None:
        if tokens > self.settings.max_prompt_tokens:
            raise http_errors.too_long(tokens, self.settings.max_prompt_tokens)

    def _step(self) -> None:
        """One step of vLLM; then end what nobody waits for."""
        for output in self._vllm.step():
            running = self._running.get(output.request_id)
            if running is not None:
                self._follow(running, output)
        for name, running in list(self._running.items()):
            job = running.answer.job
            if job.unwanted:
                job.send(Failed(http_errors.too_late()))
            if job.ended:
                self._vllm.abort_request([name])
                del self._running[name]
                self._taken.remove(job)

    def _follow(self, running: _Running, output: Any) -> None:
        answer, said = running.answer, output.outputs[0]
        job, tokens = answer.job, list(said.token_ids)
        try:
            if said.finish_reason == "error":
                raise GuardRuntimeError("the guard blocked the request")
            if tokens and not job.begun:
                length = len(output.prompt_token_ids)
                answer.begin(decisions(output)[0], running.pictures, length)
        except GuardRuntimeError:
            self.telemetry.failures.inc()
            self._due = time.monotonic()  # a self-check follows
            job.send(Failed(http_errors.failed()))
        for place, token in enumerate(tokens, 1):
            is_last = output.finished and place == len(tokens)
            if not job.ended:
                answer.add(token, is_last and said.finish_reason == "stop")
        if output.finished and not job.ended:
            job.send(Failed(http_errors.failed()))

    def _withhold(self) -> None:
        """Answer nothing more: the self-check failed."""
        for running in self._running.values():
            running.answer.job.send(Failed(http_errors.not_ready()))

    def _end(self, job: Job, error: RequestError) -> None:
        job.send(Failed(error))
        self._taken.remove(job)

    # -- the self-check --------------------------------------------------------------------------

    def _choose_question(self) -> None:
        """Find a harmful question on which a gate opens.

        Raises:
            GuardRuntimeError: there is none.
        """
        for pair in anchors()[:CANDIDATES]:
            self._question = pair.harmful
            if self._opens():
                return
        raise GuardRuntimeError(
            "self-check: no gate opens on any harmful anchor. Run `vlm-safeguard doctor`"
        )

    @staticmethod
    def _require(opened: bool) -> None:
        """That every guarded layer runs, vLLM's workers check in each step."""
        if not opened:
            raise GuardRuntimeError("self-check: no gate opened on a harmful question")

    def _opens(self) -> bool:
        """Ask the question. Whether a gate opens on it."""
        events: list[Event] = []
        asked = Conversation([{"role": "user", "content": self._question}], 0)
        end = time.monotonic() + self.settings.deadline
        job = Job(asked, Sampling(max_tokens=1), end, events.append, gates_only=True)
        self._taken.append(job)
        self._add(job)
        while not job.ended:
            self._step()
        return any(isinstance(one, Begun) and one.verdict and one.verdict.fired for one in events)
