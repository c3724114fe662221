"""Combines prompts with images: requests in the settings text, blank and picture."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from vlm_safeguard.data import drawings
from vlm_safeguard.data.image_io import open_image
from vlm_safeguard.data.ocr import reader, with_words
from vlm_safeguard.data.prompts import Prompt

Setting = Literal["text", "blank", "picture"]
SETTINGS: tuple[Setting, ...] = ("text", "blank", "picture")
PICTURED: tuple[Setting, ...] = ("blank", "picture")


@dataclass(frozen=True)
class Query:
    """What goes into the model: text and at most one picture."""

    text: str
    image: Image.Image | None


def settings_of(prompt: Prompt) -> tuple[Setting, ...]:
    """Where a prompt means what its label says: one that needs its picture, only with it."""
    return ("picture",) if prompt.form == "picture" else SETTINGS


def query(prompt: Prompt, setting: Setting) -> Query:
    """``prompt`` in ``setting``.

    Raises ``ImageError`` where the prompt's picture is a file that cannot be read.

    ``text`` takes the words alone, ``blank`` adds a flat picture, ``picture`` the picture the
    prompt speaks of or, for a prompt that stands on its own, a drawing of some object (which one
    follows from the prompt's id). Calibration prompts get flat pictures of many colours and one
    half of the objects; all others get middle grey and the other half, so that no threshold is
    fitted on the pixels it is measured with.
    """
    number = int(hashlib.sha256(prompt.id.encode()).hexdigest(), 16)
    calibrating = bool(prompt.split)
    if setting == "text":
        return Query(prompt.prompt, None)
    if setting == "blank":
        grey = drawings.blank()
        colour = (number % 256, number // 256 % 256, number // 65536 % 256)
        return Query(prompt.prompt, Image.new("RGB", grey.size, colour) if calibrating else grey)
    if prompt.picture is not None:
        return Query(prompt.prompt, _picture(dict(prompt.picture)))
    objects = drawings.OBJECTS[calibrating::2]
    return Query(prompt.prompt, drawings.draw_object(objects[number % len(objects)]))


def _picture(description: dict[str, str]) -> Image.Image:
    """The picture a prompt needs: from a file, or drawn."""
    if description["kind"] == "file":
        return open_image(description["value"])
    return drawings.draw(description)


def told(prompt: Prompt, reads_pictures: bool) -> bool:
    """Whether the label of a prompt shows in what the text-only pass reads."""
    return prompt.speaks_for_itself or reads_pictures


def spoken(prompt: Prompt, reads_pictures: bool) -> Query:
    """What the text-only pass reads of ``prompt``: its text, and the words in its picture if
    ``reads_pictures``. (Drawn objects contain no words.)"""
    if not reads_pictures or prompt.speaks_for_itself or prompt.picture is None:
        return Query(prompt.prompt, None)
    words = reader().words(_picture(dict(prompt.picture)))
    return Query(with_words(prompt.prompt, words), None)


def queries(prompts: Iterable[Prompt], setting: Setting) -> list[Query]:
    """All ``prompts`` in ``setting``."""
    return [query(prompt, setting) for prompt in prompts]


def batches(tokenizer: Any, items: Sequence[Query], size: int) -> list[list[int]]:
    """Indices in batches of similar length, long ones first (a lack of memory shows at once), those
    with a picture apart from those without.

    Lengths are in tokens, because rows are padded to the longest: a text to what a picture takes,
    were they together. In some families it is then not answered as it is alone, either.
    """
    texts = [item.text.encode("utf-8", "replace").decode() for item in items]  # no lone surrogates
    lengths = [len(ids) for ids in tokenizer(texts).input_ids] if texts else []
    found = []
    for pictured in (True, False):
        rows = [row for row, item in enumerate(items) if (item.image is not None) is pictured]
        rows.sort(key=lambda row: -lengths[row])
        found += [rows[start : start + size] for start in range(0, len(rows), size)]
    return found
