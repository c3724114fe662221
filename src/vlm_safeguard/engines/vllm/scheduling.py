"""Schedules a request's text-only passes first and holds back its tokens until gates decide.

The text-only pass of a request is a request of its own, of one token, in the same batch as others
and with the same prefix cache, which it only fills where the guard reads means over words. The
request itself waits outside of the scheduler until the workers have reported on its texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.request import Request, RequestStatus

from vlm_safeguard.engines.vllm.messages import KEY, REPORT, Order, Report, Role, order_of, put

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler as _Scheduler
else:
    _Scheduler = object


@dataclass
class _Held:
    """A request that waits, and the ids of its texts that are not read yet."""

    request: Any
    unread: set[str]


class GuardedScheduling(_Scheduler):
    """What a guarded scheduler does beside the one that it is mixed into."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._held: dict[str, _Held] = {}
        self._text_of: dict[str, str] = {}  # by the id of a text: the request it is read for
        self._decided: set[str] = set()
        self._shut: set[str] = set()  # those of them that no gate opened on
        # Of requests whose output vLLM threw away in that step: workers report only once.
        self._kept: dict[str, Report] = {}
        coordinator = self.kv_cache_manager.coordinator
        coordinator.cache_blocks = self._keeping_steered_states(coordinator.cache_blocks)

    # -- requests come and go ----------------------------------------------------------------------

    def add_request(self, request: Any) -> None:
        """Schedule a request, or its texts first.

        Raises:
            GuardRuntimeError: it did not go through a guarded front end.
        """
        order = order_of(request.sampling_params)
        request.sampling_params = copy(request.sampling_params)  # n answers share one
        put(
            request.sampling_params,
            Role(order.guard, "", len(order.texts), 0, True, order.wordless, order.canary),
        )
        if not order.texts:
            super().add_request(request)
            return
        texts = [
            self._text_request(request, order, form, ids) for form, ids in enumerate(order.texts)
        ]
        self._held[request.request_id] = _Held(request, {text.request_id for text in texts})
        for text in texts:
            self._text_of[text.request_id] = request.request_id
            super().add_request(text)

    def finish_requests(self, request_ids: Any, finished_status: Any) -> list[Any]:
        """End requests, those that wait for their texts too."""
        ids: set[str]
        if request_ids is None:
            ids = {*self.requests, *self._held}
        else:
            ids = {request_ids} if isinstance(request_ids, str) else set(request_ids)
        dropped = [self._held[name] for name in ids & set(self._held)]
        texts: set[str] = set()
        for held in dropped:
            texts |= held.unread
            held.request.status = finished_status
            self._drop(held.request.request_id)
        ended: list[Any] = super().finish_requests(ids | texts, finished_status)
        for text in texts:
            del self._text_of[text]
        # A text that ends by itself stays among ``_text_of`` until its output is looked at.
        users = [request for request in ended if request.request_id not in texts]
        return users + [held.request for held in dropped]

    def get_request_counts(self) -> tuple[int, int]:
        """Requests that run, and those that wait."""
        running, waiting = super().get_request_counts()
        return running, waiting + len(self._held)

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        self._decided.discard(request.request_id)
        self._shut.discard(request.request_id)
        self._kept.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)

    def _text_request(self, request: Any, order: Order, form: int, ids: list[int]) -> Any:
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            skip_reading_prefix_cache=order.uncached,
        )
        role = Role(
            order.guard,
            reads_for=request.request_id,
            form=form,
            width=request.num_prompt_tokens,
            judged=form in order.judged,
            wordless=order.wordless,
            canary=order.canary,
        )
        put(params, role)
        return Request(
            request_id=f"{request.request_id}#text{form}",
            prompt_token_ids=list(ids),
            sampling_params=params,
            pooling_params=None,
            client_index=request.client_index,
            arrival_time=request.arrival_time,
            cache_salt=request.cache_salt,
            priority=request.priority,
            block_hasher=request._block_hasher,
        )

    def _drop(self, name: str) -> None:
        """A request that waits will not run: the workers forget what they read for it."""
        del self._held[name]
        self.finished_req_ids.add(name)

    # -- a step comes back -------------------------------------------------------------------------

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Take the tokens of a step. Those of a request that failed, or on which nobody reported,
        are thrown away, and it ends with an error."""
        new: dict[str, Report] = getattr(model_runner_output, REPORT, None) or {}
        reports = {**self._kept, **new}
        self._withhold(scheduler_output.num_scheduled_tokens, model_runner_output, reports)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for client in outputs.values():
            users: list[Any] = []
            for output in client.outputs:
                report = reports.pop(output.request_id, None)
                if output.request_id in self._text_of:
                    users += self._text_read(output, report)
                    continue
                if report is not None:
                    output.kv_transfer_params = {KEY: asdict(report)}
                users.append(output)
            client.outputs = users
        self._kept = {name: report for name, report in reports.items() if name in self.requests}
        return outputs

    def _withhold(
        self, scheduled: Iterable[str], model_runner_output: Any, reports: dict[str, Report]
    ) -> None:
        """Keep back tokens that no gate decided on, and note what was decided.

        It adds to ``reports`` for requests that the workers did not report on.
        """
        sampled, places = model_runner_output.sampled_token_ids, model_runner_output.req_id_to_index
        for name in scheduled:
            report = reports.get(name)
            tokens = sampled[places[name]] if sampled and name in places else ()
            if report is None and tokens and name not in self._decided:
                report = reports[name] = Report(failed="the workers did not report on the request")
            if report is None:
                continue
            if report.failed:
                if sampled:
                    sampled[places[name]] = []
                # vLLM ends these with an error in its own ``update_from_output``.
                self.encoder_cache_mismatch_reqs.add(name)
                continue
            self._decided.add(name)
            if not report.fired:
                self._shut.add(name)

    def _text_read(self, output: Any, report: Report | None) -> list[Any]:
        """The output of a text came: let its request in after the last one, or end it.

        Returns:
            The output that ends the request, if it failed.
        """
        name = self._text_of.pop(output.request_id)
        held = self._held.get(name)
        if held is None:
            return []
        held.unread.discard(output.request_id)
        if report is None or report.failed or output.finish_reason in _LOST:
            reason = report.failed if report else ""
            self._drop(name)
            super().finish_requests(held.unread, RequestStatus.FINISHED_ABORTED)
            for text in held.unread:
                self._text_of.pop(text, None)
            failure = Report(failed=reason or "the request's text was not read")
            return [
                EngineCoreOutput(
                    request_id=name,
                    new_token_ids=[],
                    finish_reason=FinishReason.ERROR,
                    kv_transfer_params={KEY: asdict(failure)},
                )
            ]
        if not held.unread:
            del self._held[name]
            super().add_request(held.request)
        return []

    # -- the prefix cache --------------------------------------------------------------------------

    def _keeping_steered_states(self, own: Callable[..., None]) -> Callable[..., None]:
        """Share no steered state with other requests: the last prompt token and what follows it
        only where no gate opened."""

        def cache_blocks(request: Any, num_computed_tokens: int) -> None:
            name = request.request_id
            if name not in self._shut and name not in self._text_of:
                num_computed_tokens = min(num_computed_tokens, request.num_prompt_tokens - 1)
            own(request, num_computed_tokens)

        return cache_blocks


_LOST = (FinishReason.ABORT, FinishReason.ERROR)


def guarded(base: type) -> type:
    """The scheduler class ``base`` under guard."""
    return type(f"Guarded{base.__name__}", (GuardedScheduling, base), {})
