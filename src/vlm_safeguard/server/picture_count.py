"""Counts the pictures that reach the model, so that none is dropped on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlm_safeguard.errors import ModelError
from vlm_safeguard.model.chat import render, render_conversation
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.text_only import image_token
from vlm_safeguard.server import http_errors
from vlm_safeguard.server.job import Job, Pictures


def marker_of(processor: Any) -> str:
    """What stands for one picture in a rendered prompt.

    Raises:
        ModelError: the processor does not say.
    """
    for name in ("boi_token", "image_token"):
        marker = getattr(processor, name, None)
        if isinstance(marker, str) and marker in render(processor, "", 1):
            return marker
    raise ModelError(
        f"{type(processor).__name__} has no image_token that its chat template writes, so pictures "
        "cannot be counted: set processor.image_token and save the processor"
    )


def count_pictures(
    loaded: LoadedModel, marker: str, jobs: Sequence[Job], inputs: dict[str, Any]
) -> list[Pictures]:
    """Pictures of each request, by the placeholders in its rendered prompt and in its inputs.

    Args:
        loaded: the model and its processor.
        marker: what stands for one picture in a rendered prompt.
        jobs: the requests.
        inputs: their model inputs.

    Raises:
        RequestError: a request holds another number of pictures than its prompt, or its inputs have
            no place for each.
    """
    found = [count(loaded.processor, marker, job) for job in jobs]
    places = (inputs["input_ids"] == image_token(loaded)).sum(1).tolist()  # one or more for each
    pixels = any(name.startswith("pixel_values") for name in inputs)
    for pictures, most in zip(found, places, strict=True):
        if pictures.reached > (most if pixels else 0):
            raise http_errors.image_lost()
    return found


def count(processor: Any, marker: str, job: Job) -> Pictures:
    """Pictures of one request, by the placeholders in its rendered prompt.

    Raises:
        RequestError: it holds another number of pictures than its prompt.
    """
    sent = job.conversation.pictures
    reached = render_conversation(processor, job.conversation.messages).count(marker)
    if sent != reached:
        raise http_errors.image_lost()
    return Pictures(sent, reached, job.conversation.read)
