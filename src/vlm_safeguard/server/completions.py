"""Converts chat request bodies to sampling settings and answers to completions."""

from __future__ import annotations

import time
from typing import Any

from vlm_safeguard.server import http_errors
from vlm_safeguard.server.exchange import Exchange, new_id
from vlm_safeguard.server.http_errors import STATUS, RequestError
from vlm_safeguard.server.job import Begun, Pictures, Sampling
from vlm_safeguard.server.schema import ChatRequest
from vlm_safeguard.server.settings import Settings

CHAT = "chat"  # the endpoint in metrics and the audit log


def check_model(name: str, settings: Settings) -> None:
    """Raises ``RequestError`` if a request is for another model than the server's."""
    if name != settings.model:
        raise RequestError(
            404, f"this server has one model: {settings.model}", "not_found_error", "model"
        )


def sampling_of(body: ChatRequest, settings: Settings) -> Sampling:
    """How the tokens of an answer are chosen.

    Raises:
        RequestError: the answer may be too long, or a stop sequence is none.
    """
    told = body.max_completion_tokens or body.max_tokens
    wanted = told or settings.default_tokens
    if wanted > settings.max_tokens:
        raise RequestError(
            400, f"at most {settings.max_tokens} tokens are answered", param="max_tokens"
        )
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if any(not word or len(word) > 200 for word in stop):
        raise RequestError(400, "a stop sequence has 1 to 200 characters", param="stop")
    top_p = 1.0 if body.top_p is None else body.top_p
    return Sampling(wanted, told is None, body.temperature or 0.0, top_p, body.seed, stop)


class Answer:
    """The parts of a chat response that do not depend on its text.

    Args:
        settings: the server's.
        begun: what was decided on the request.
        trusted: whether gate scores are shown.

    ``headers``: of the response. ``mode``: the server's.
    """

    def __init__(self, settings: Settings, begun: Begun, trusted: bool) -> None:
        self._settings, self._begun, self._trusted = settings, begun, trusted
        self._id, self._created = new_id("chatcmpl"), int(time.time())
        self.mode, self._status = settings.mode, _status(settings, begun)
        self.headers = {STATUS: self._status}

    def _common(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._settings.model,
            "system_fingerprint": None,
        }

    def completion(self, text: str, exchange: Exchange) -> dict[str, Any]:
        """The whole answer."""
        if exchange.done is None:
            raise http_errors.failed()
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "finish_reason": exchange.done.finish_reason,
            "logprobs": None,
        }
        return self._common("chat.completion") | {
            "choices": [choice],
            "usage": self._usage(exchange),
            "safeguard": self._safeguard(),
        }

    def chunk(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        """A part of a streamed answer."""
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return self._common("chat.completion.chunk") | {"choices": [choice]}

    def first(self) -> dict[str, Any]:
        """The first part, with what the guard decided."""
        opened = self.chunk({"role": "assistant", "content": ""})
        return opened | {"safeguard": self._safeguard()}

    def last(self, exchange: Exchange) -> dict[str, Any]:
        """The part after the last, with the number of tokens."""
        return self._common("chat.completion.chunk") | {
            "choices": [],
            "usage": self._usage(exchange),
        }

    def _usage(self, exchange: Exchange) -> dict[str, int]:
        prompt = self._begun.prompt_tokens
        answer = exchange.done.completion_tokens if exchange.done else 0
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
        }

    def _safeguard(self) -> dict[str, Any]:
        verdict = self._begun.verdict
        told = safeguard(self._status, self.mode, self._begun.pictures)
        if self._trusted and verdict is not None:
            told |= {
                "fired": verdict.fired,
                "gates": list(verdict.gates),
                "scores": verdict.scores,
            }
        return told


def _status(settings: Settings, begun: Begun) -> str:
    if begun.verdict is None:
        return "unguarded"
    return "monitor" if settings.mode == "monitor" else "guarded"


def safeguard(status: str, mode: str, pictures: Pictures) -> dict[str, Any]:
    """The field that says how a response was guarded."""
    return {
        "status": status,
        "mode": mode,
        "pictures": {
            "sent": pictures.sent,
            "reached_model": pictures.reached,
            "words_read": pictures.read,
        },
    }
