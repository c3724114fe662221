"""Errors with an HTTP status, in OpenAI's format. Messages never quote exceptions of libraries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_safeguard.errors import PromptTooLong, SafeguardError

STATUS = "X-Safeguard-Status"  # header: how the response was guarded
FAILED = "the guard or the model failed, and the answer is withheld"


class RequestError(SafeguardError):
    """A request that gets an error instead of an answer.

    Attributes:
        status: the HTTP status.
        kind: OpenAI's error type.
        param: the field that is wrong, if one is.
        retry_after: seconds until another try makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.retry_after = status, kind, param, retry_after

    @property
    def guarded(self) -> str:
        """How the request was guarded: there is no answer."""
        return "failed" if self.status >= 500 else "rejected"

    @property
    def headers(self) -> dict[str, str]:
        found = {STATUS: self.guarded}
        if self.retry_after is not None:
            found["Retry-After"] = str(self.retry_after)
        if self.status == 401:
            found["WWW-Authenticate"] = "Bearer"
        return found

    def body(self, mode: str) -> dict[str, Any]:
        """The body of the response; ``mode``: the server's."""
        return {
            "error": {
                "message": str(self),
                "type": self.kind,
                "param": self.param,
                "code": self.status,
            },
            "safeguard": {"status": self.guarded, "mode": mode},
        }


def invalid(first: Mapping[str, Any]) -> RequestError:
    """A field of the body is wrong; ``first``: of the errors that pydantic lists."""
    where = ".".join(str(part)[:80] for part in first["loc"] if part != "body")[:200] or None
    reason = "it is not supported" if first["type"] == "extra_forbidden" else first["msg"][:200]
    return RequestError(400, f"{where or 'body'}: {reason}", param=where)


def failed() -> RequestError:
    """The guard or the model failed."""
    return RequestError(500, FAILED, "guard_failed")


def unusable() -> RequestError:
    """The model's processor or chat template does not take the messages."""
    return RequestError(
        400, "the model's chat template or processor refuses these messages", param="messages"
    )


def unreadable() -> RequestError:
    """The text holds a control token that is hidden by other characters."""
    return RequestError(
        400,
        "the messages hide a control token of the model among invisible or unusual characters: "
        "take those characters out",
        param="messages",
    )


def too_long(tokens: int, most: int) -> RequestError:
    """The prompt has too many tokens."""
    return RequestError(
        400,
        f"the prompt has {tokens} tokens, images included; at most {most} are accepted",
        param="messages",
    )


def no_room(error: PromptTooLong) -> RequestError:
    """The prompt does not fit the model, as it stands or as the guard reads it."""
    return RequestError(400, str(error), param="messages")


def image_lost() -> RequestError:
    """A picture is not in the prompt."""
    return RequestError(500, "an image did not reach the model", "image_lost")


def not_ready() -> RequestError:
    """The guard does not pass its self-check."""
    return RequestError(
        503, "the guard does not pass its self-check; nothing is answered", "not_ready", None, 30
    )


def too_busy(seconds: int) -> RequestError:
    """The queue is full."""
    return RequestError(429, "too many requests wait; try again later", "queue_full", None, seconds)


def too_late() -> RequestError:
    """The deadline passed."""
    return RequestError(504, "the request did not end within its deadline", "deadline_exceeded")
