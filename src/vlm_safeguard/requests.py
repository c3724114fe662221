"""Requests as the guard meets them: a prompt in one of the settings text, blank, picture."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from vlm_safeguard import pictures
from vlm_safeguard.prompts import Prompt

Setting = Literal["text", "blank", "picture"]
SETTINGS: tuple[Setting, ...] = ("text", "blank", "picture")


@dataclass(frozen=True)
class Request:
    """What goes into the model: text and at most one picture."""

    text: str
    image: Image.Image | None


def request(prompt: Prompt, setting: Setting) -> Request:
    """``prompt`` in ``setting``.

    ``text`` takes the words alone, ``blank`` adds a flat grey picture, ``picture`` the picture
    the prompt speaks of or, for a prompt that stands on its own, a drawing of some object (which
    one follows from the prompt's id).
    """
    if setting == "text":
        return Request(prompt.prompt, None)
    if setting == "blank":
        return Request(prompt.prompt, pictures.blank())
    if prompt.picture is not None:
        return Request(prompt.prompt, pictures.draw(dict(prompt.picture)))
    pick = int(hashlib.sha256(prompt.id.encode()).hexdigest(), 16) % len(pictures.OBJECTS)
    return Request(prompt.prompt, pictures.draw_object(pictures.OBJECTS[pick]))


def requests(prompts: Iterable[Prompt], setting: Setting) -> list[Request]:
    """All ``prompts`` in ``setting``."""
    return [request(prompt, setting) for prompt in prompts]


def batches(items: Sequence[Request], size: int) -> list[list[int]]:
    """Indices in batches of similar length, long ones first (a lack of memory shows at once)."""
    order = sorted(range(len(items)), key=lambda i: -len(items[i].text))
    return [order[start : start + size] for start in range(0, len(order), size)]
