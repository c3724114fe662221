"""The guard in vLLM's front end: plans what gates read and releases answers once decided."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from vlm_safeguard.engines.vllm import pictures
from vlm_safeguard.engines.vllm.identity import load_processor
from vlm_safeguard.engines.vllm.messages import KEY, Report, guard_digest, put
from vlm_safeguard.engines.vllm.telemetry import counters
from vlm_safeguard.engines.vllm.texts import TextForms
from vlm_safeguard.errors import GuardRuntimeError, TextTooLong
from vlm_safeguard.guard import Guard
from vlm_safeguard.runtime.attestation import Decision

logger = logging.getLogger(__name__)
_ATTRIBUTE = "vlm_safeguard"  # of a RequestOutput, and of vLLM's state of a request


class FrontEnd:
    """The guard of one front-end process."""

    def __init__(self, guard: Guard) -> None:
        self._guard, self._digest = guard, guard_digest(guard)
        self._reads_pictures = guard.config.reads_pictures
        self._words = pictures.Words()
        self._forms: TextForms | None = None

    # -- requests come in --------------------------------------------------------------------------

    def look_at(self, data: Mapping[str, Any], uuids: Any) -> tuple[dict[str, Any], list[str]]:
        """Check the media of a request, and read the words in its pictures.

        Args:
            data: ``multi_modal_data``.
            uuids: ``multi_modal_uuids``.

        Returns:
            The media that vLLM is to process, and the words in each picture, if the guard reads
            them.

        Raises:
            GuardRuntimeError: there is something else than pictures, or they come under names of
                their own, which could name others.
            ImageError: a picture is no ``PIL.Image``, or is damaged, too large or too small.
            SafeguardError: the OCR library is missing.
        """
        if uuids and any(_leaves(uuids)):
            raise GuardRuntimeError(
                "pictures under ids of their own (multi_modal_uuids) are not guarded: leave them "
                "out"
            )
        media, found = pictures.checked(data)
        return media, pictures.words_in(found) if self._reads_pictures else []

    def keep(self, processed: dict[str, Any], words: list[str]) -> None:
        """Keep the words in pictures until their request comes.

        ``processed``: what vLLM made of the pictures. It is marked: nothing else is let in.
        """
        processed[KEY] = True
        if self._reads_pictures:
            self._words.keep(processed["mm_hashes"].get("image", []), words)

    def check_prompt(self, prompt: Any) -> None:
        """Check a prompt before vLLM makes a request of it.

        Raises:
            GuardRuntimeError: its pictures come as tensors, with hashes and places of their own,
                which nobody looked at.
        """
        if isinstance(prompt, Mapping) and prompt.get("type") == "multimodal" and KEY not in prompt:
            raise GuardRuntimeError(
                "pictures that were processed elsewhere are not guarded: send the pictures"
            )

    def order(self, request: Any, model_config: Any) -> None:
        """Write the guard's order into an ``EngineCoreRequest``, and salt its prefix cache.

        Raises:
            GuardRuntimeError: it is of a kind that is not guarded.
            TextTooLong: what the guard reads of it does not fit vLLM's context.
        """
        params = request.sampling_params
        if params is None:
            raise GuardRuntimeError("only requests that generate are guarded, no pooling")
        if params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None:
            # At each position of the prompt they tell what the unsteered model would say next.
            raise GuardRuntimeError(
                "probabilities inside of the prompt (prompt_logprobs, or echo with logprobs) are "
                "not guarded: leave them out"
            )
        if request.prompt_embeds is not None or request.prompt_token_ids is None:
            raise GuardRuntimeError("the guard reads token ids: prompt embeddings are not guarded")
        if request.lora_request is not None:
            raise GuardRuntimeError("adapters (LoRA) are not guarded: the guard is of the model")
        if request.resumable:
            raise GuardRuntimeError("a prompt that goes on later is not guarded: send it whole")
        if KEY in (params.extra_args or {}):
            raise GuardRuntimeError(f"{KEY} in extra_args belongs to the guard: leave it out")
        features = request.mm_features or []
        if any(feature.modality != "image" for feature in features):
            raise GuardRuntimeError("only pictures are guarded, no videos and no sound")
        places = [
            range(
                feature.mm_position.offset, feature.mm_position.offset + feature.mm_position.length
            )
            for feature in features
        ]
        words = (
            [self._words.of(feature.mm_hash) for feature in features]
            if self._reads_pictures
            else []
        )
        if self._forms is None:
            self._forms = TextForms(self._guard, load_processor(model_config))
        order = self._forms.order(request.prompt_token_ids, places, words)
        # vLLM checks the prompt, but not the texts, which are requests of their own in its core.
        longest, most = max(map(len, order.texts), default=0), model_config.max_model_len - 1
        if longest > most:
            raise TextTooLong(longest, most)
        put(params, order)
        request.cache_salt = ":".join(filter(None, (self._digest, request.cache_salt)))

    # -- answers go out ----------------------------------------------------------------------------

    def let_out(self, outputs: Iterable[Any], states: Mapping[str, Any]) -> None:
        """Look at what the engine core returns, before any of it goes out.

        Args:
            outputs: ``EngineCoreOutput``s. What the guard wrote into them is taken out.
            states: vLLM's state of each request, by id.

        Raises:
            GuardRuntimeError: a token came on which no gate decided.
        """
        for output in outputs:
            state = states.get(output.request_id)
            written = output.kv_transfer_params or {}
            if KEY in written:
                report = Report(**written.pop(KEY))
                output.kv_transfer_params = written or None
                if state is not None:
                    counters().count(report)
                    _reports(state)[state.request_index] = report
                    if report.failed:
                        logger.error("the guard blocked a request: %s", report.failed)
            if state is None or not output.new_token_ids:
                continue
            known = _reports(state).get(state.request_index)
            if known is None or known.failed:
                raise GuardRuntimeError(
                    "a token came on which no gate decided: the guard is not armed in every "
                    "process of vLLM"
                )
            counters().count_tokens(len(output.new_token_ids))

    def mark(self, state: Any, output: Any) -> None:
        """Put the decisions on a ``RequestOutput``."""
        if output is not None:
            setattr(output, _ATTRIBUTE, dict(_reports(state)))


def is_decided(output: Any) -> bool:
    """Whether a ``RequestOutput`` comes from a guarded engine."""
    return hasattr(output, _ATTRIBUTE)


def decisions(output: Any) -> list[Decision]:
    """What the guard decided on the answers in a ``RequestOutput``, in order.

    Raises:
        GuardRuntimeError: the output did not come from a guarded engine, or the guard blocked it.
    """
    if not is_decided(output):
        raise GuardRuntimeError("this output does not come from a guarded engine")
    reports: dict[int, Report] = getattr(output, _ATTRIBUTE)
    blocked = next((report.failed for report in reports.values() if report.failed), "")
    if blocked:
        raise GuardRuntimeError(f"the request is blocked: {blocked}")
    return [reports[index].decision for index in sorted(reports)]


def _reports(state: Any) -> dict[int, Report]:
    """The reports on a request, by the place of its answer; those of n answers in one place."""
    home = state.parent_req if state.parent_req is not None else state
    found: dict[int, Report] = home.__dict__.setdefault(_ATTRIBUTE, {})
    return found


def _leaves(uuids: Any) -> list[Any]:
    if isinstance(uuids, Mapping):
        return [leaf for value in uuids.values() for leaf in _leaves(value)]
    if isinstance(uuids, list | tuple):
        return [leaf for value in uuids for leaf in _leaves(value)]
    return [uuids]
