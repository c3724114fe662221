"""Turns the messages of a request into a conversation for the model, with decoded pictures."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlm_safeguard.data.image_io import LIMITS, decode_image
from vlm_safeguard.data.ocr import reader
from vlm_safeguard.errors import ImageError
from vlm_safeguard.server.http_errors import RequestError
from vlm_safeguard.server.schema import ImagePart, Message
from vlm_safeguard.server.settings import Settings

_DATA_URI = re.compile(r"data:image/(?:png|jpe?g|webp);base64,", re.IGNORECASE)


@dataclass(frozen=True)
class Conversation:
    """Messages in the chat format of transformers.

    Attributes:
        messages: the messages.
        pictures: how many pictures they hold.
        pixels: of all pictures.
        read: of how many of them the words were read.
    """

    messages: list[dict[str, Any]]
    pictures: int
    pixels: int = 0
    read: int = 0


@dataclass(frozen=True)
class Takes:
    """What model and guard make of messages.

    Attributes:
        system: whether the chat template writes what a system message says.
        words: whether the guard reads the words in pictures.
    """

    system: bool
    words: bool


def read_messages(messages: Sequence[Message], settings: Settings, takes: Takes) -> Conversation:
    """Check limits, decode the pictures, and read their words, which the reader keeps for the
    engine.

    Raises:
        RequestError: a limit is exceeded, roles are in the wrong order or not taken, or a picture
            is refused.
    """
    _check_limits(messages, settings)
    if messages[0].role == "system" and not takes.system:
        raise RequestError(
            400,
            "the model's chat template has no system message: say it in the user's",
            param="messages[0].role",
        )
    pictures = pixels = read = 0
    turns: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        if isinstance(message.content, str):
            turns.append({"role": message.role, "content": message.content})
            continue
        parts: list[dict[str, Any]] = []
        for place, part in enumerate(message.content):
            if isinstance(part, ImagePart):
                where = f"messages[{number}].content[{place}].image_url.url"
                image = _picture(part.image_url.url, where)
                parts.append({"type": "image", "image": image})
                pictures += 1
                pixels += image.width * image.height
                if takes.words:
                    reader().words(image)
                    read += 1
            else:
                parts.append({"type": "text", "text": part.text})
        turns.append({"role": message.role, "content": parts})
    return Conversation(turns, pictures, pixels, read)


def _check_limits(messages: Sequence[Message], settings: Settings) -> None:
    def refuse(reason: str) -> None:
        raise RequestError(400, reason, param="messages")

    if len(messages) > settings.max_messages:
        refuse(f"at most {settings.max_messages} messages are accepted")
    if messages[-1].role != "user":
        refuse("the last message must be the user's")
    roles = [message.role for message in messages]
    if "system" in roles[1:]:
        refuse("a system message must be the first")
    pictures = characters = 0
    for message in messages:
        if isinstance(message.content, str):
            characters += len(message.content)
            continue
        for part in message.content:
            if isinstance(part, ImagePart):
                if message.role != "user":
                    refuse("only the user's messages may hold images")
                pictures += 1
            else:
                characters += len(part.text)
    if characters > settings.max_characters:
        refuse(f"at most {settings.max_characters} characters are accepted")
    if pictures > settings.max_images:
        refuse(f"at most {settings.max_images} images are accepted")


def _picture(url: str, where: str) -> Any:
    head = _DATA_URI.match(url[:40])
    if head is None:
        raise RequestError(
            400,
            "images are accepted as data URIs only: data:image/png;base64,... (png, jpeg or webp)",
            param=where,
        )
    if (len(url) - head.end()) * 3 // 4 > LIMITS.max_bytes:
        raise RequestError(400, f"an image has at most {LIMITS.max_bytes} bytes", param=where)
    try:
        data = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(400, "the data URI is not valid base64", param=where) from None
    try:
        return decode_image(data)
    except ImageError as error:
        raise RequestError(400, str(error), param=where) from None
