"""Counts the pictures that reach the model, so that none is dropped on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlm_safeguard.errors import ModelError
from vlm_safeguard.model.chat import render, render_conversation
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
    processor: Any, marker: str, jobs: Sequence[Job], inputs: dict[str, Any], read: bool
) -> list[Pictures]:
    """Pictures of each request, by the placeholders in its rendered prompt.

    Args:
        processor: the model's processor.
        marker: what stands for one picture in a rendered prompt.
        jobs: the requests.
        inputs: their model inputs.
        read: whether the guard reads the words in pictures.

    Raises:
        RequestError: a request holds another number of pictures than its prompt.
    """
    found = [count(processor, marker, job, read) for job in jobs]
    whole = any(name.startswith("pixel_values") for name in inputs) or not sum(
        pictures.sent for pictures in found
    )
    if not whole or any(pictures.sent != pictures.reached for pictures in found):
        raise http_errors.image_lost()
    return found


def count(processor: Any, marker: str, job: Job, read: bool) -> Pictures:
    """Pictures of one request; see ``count_pictures``."""
    sent = job.conversation.pictures
    reached = render_conversation(processor, job.conversation.messages).count(marker)
    return Pictures(sent, reached, sent if read else 0)
