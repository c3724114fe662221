"""Requests of the OpenAI chat API, as far as they are supported.

Every field that is not listed is refused by name, because a client that sends it relies on it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from vlm_safeguard.server.settings import Mode


class _StrictBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_StrictBody):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImageURL(_StrictBody):
    """A picture as a data URI. ``detail`` is accepted and has no effect."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_StrictBody):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageURL


# The first wrong item ends the check of a list: one message for each of 100,000 helps nobody.
Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Parts = Annotated[list[Part], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]


class Message(_StrictBody):
    """One turn. Pictures belong to the user."""

    role: Literal["system", "user", "assistant"]
    content: str | Parts
    name: None = None
    refusal: None = None


class StreamOptions(_StrictBody):
    """``include_usage``: the last chunk has the number of tokens."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(_StrictBody):
    """Body of ``POST /v1/chat/completions``."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None
    stop: str | Annotated[Texts, Field(max_length=4)] | None = None
    n: Annotated[int | None, Field(ge=1, le=1)] = None
    presence_penalty: Annotated[float | None, Field(ge=0, le=0)] = None
    frequency_penalty: Annotated[float | None, Field(ge=0, le=0)] = None
    logprobs: Literal[False] | None = None
    user: str | None = None


class Error(BaseModel):
    """What is wrong, in OpenAI's form."""

    message: str
    type: str
    param: str | None
    code: int


class NoAnswer(BaseModel):
    """How a request without an answer was guarded."""

    status: Literal["rejected", "failed"]
    mode: Mode


class ErrorBody(BaseModel):
    """Body of every answer with a status of 400 or above."""

    error: Error
    safeguard: NoAnswer


class ModerationRequest(_StrictBody):
    """Body of ``POST /v1/moderations``: texts, or one request of texts and pictures."""

    input: str | Texts | Parts
    model: str | None = None
