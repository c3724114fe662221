"""Looks at the pictures of a request before vLLM processes them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from vlm_safeguard.data.image_io import as_picture
from vlm_safeguard.data.ocr import reader
from vlm_safeguard.errors import GuardRuntimeError

_KEPT = 4096  # pictures whose words are kept until their request comes


class Words:
    """The words in pictures, by the hash that vLLM gives a picture."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, str] = OrderedDict()

    def keep(self, hashes: Sequence[str], words: Sequence[str]) -> None:
        """Remember the words in pictures."""
        for key, value in zip(hashes, words, strict=True):
            self._known[key] = value
            self._known.move_to_end(key)
        while len(self._known) > _KEPT:
            self._known.popitem(last=False)

    def of(self, key: str) -> str:
        """The words in a picture.

        Raises:
            GuardRuntimeError: nobody read it.
        """
        if key not in self._known:
            raise GuardRuntimeError(
                "this guard reads the words in pictures, and one of the request's was not read: "
                "send it again"
            )
        return self._known[key]


def checked(data: Mapping[str, Any]) -> tuple[dict[str, Any], list[Image.Image]]:
    """A request's media as vLLM takes them, and its pictures.

    Args:
        data: ``multi_modal_data``.

    Raises:
        GuardRuntimeError: there is something else than pictures.
        ImageError: a picture is no ``PIL.Image``, or is damaged, too large or too small.
    """
    given = {kind: value for kind, value in data.items() if value is not None}
    if set(given) - {"image"}:
        raise GuardRuntimeError(
            "only pictures are guarded, no videos and no sound: the guard's gates were set on "
            "text and pictures"
        )
    if not given:
        return {}, []
    images = given["image"]
    images = list(images) if isinstance(images, list | tuple) else [images]
    pictures = [as_picture(getattr(image, "media", image)) for image in images]
    return {"image": pictures}, pictures


def words_in(pictures: Sequence[Image.Image]) -> list[str]:
    """The words in each picture.

    Raises:
        SafeguardError: the OCR library is missing.
    """
    return [reader().words(picture) for picture in pictures]
