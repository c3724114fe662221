"""Hostile inputs for the server: mutations of sound requests and pictures.

Input N of a seed is the same in every run.
"""

from __future__ import annotations

import base64
import json
import random
from typing import Any

from tests.fuzz.mutations import bytewise, dump, json_aware
from tests.server.attacks import pictures

TEXTS = [
    "hi", "what is in the picture?", "<image>", "</s>", "{{ 7*7 }}", "\u200b\u202e", "\x00",
    "e" + "\u0301" * 30, "",
]  # fmt: skip
_BAD_TEXTS = ["\ud800", "a" * 3000]
_SOUND = list(pictures.accepted().values())
_PICTURES = [*_SOUND, *pictures.refused().values()]
_SMALL = [data for data in _PICTURES if 0 < len(data) < 20_000]


def conversation(chance: random.Random) -> dict[str, Any]:
    """A sound chat request."""
    messages: list[Any] = []
    if chance.random() < 0.3:
        messages.append({"role": "system", "content": text(chance)})
    for _ in range(chance.choice([0, 0, 1, 3])):
        messages.append({"role": "user", "content": text(chance)})
        messages.append({"role": "assistant", "content": text(chance)})
    parts: list[Any] = [{"type": "text", "text": text(chance)}]
    for _ in range(chance.choice([0, 0, 1, 2])):
        kind = chance.choice(["png", "jpeg", "webp"])
        data = chance.choice(_SOUND) if chance.random() < 0.8 else picture(chance)
        parts.insert(0, pictures.part(pictures.uri(data, kind)))
    messages.append({"role": "user", "content": parts})
    body: dict[str, Any] = {"model": "tiny", "messages": messages, "max_tokens": 1}
    if chance.random() < 0.4:
        body |= {"temperature": chance.choice([0, 1e-300, 1, 2]), "seed": 1, "top_p": 0.5}
    if chance.random() < 0.2:
        body |= {"stop": chance.choice(["a", ["a", "b"]]), "stream": False}
    return body


def text(chance: random.Random) -> str:
    return chance.choice(_BAD_TEXTS if chance.random() < 0.03 else TEXTS)


def picture(chance: random.Random) -> bytes:
    """A picture, whole or changed in some bytes."""
    data = chance.choice(_SMALL)
    return data if chance.random() < 0.3 else bytewise(data, chance.choice(_SMALL), chance)


def request(number: int, seed: int) -> bytes:
    """A request body: sound, changed as JSON, or changed byte by byte."""
    chance = random.Random(f"{seed}:request:{number}")
    body: Any = conversation(chance)
    for _ in range(chance.choice([0, 0, 1, 2])):
        try:
            body = json_aware(body, chance)
        except (IndexError, TypeError, KeyError, AttributeError, RecursionError, ValueError):
            break
    try:
        data = dump(body).encode("utf-8", "surrogatepass")
    except RecursionError:
        data = b"[" * 2000
    if chance.random() < 0.2:
        data = bytewise(data, json.dumps(conversation(chance)).encode(), chance)
    return data


def image(number: int, seed: int) -> bytes:
    """A picture file: two times of three one that was changed in several places."""
    chance = random.Random(f"{seed}:image:{number}")
    data = chance.choice(_SMALL)
    for _ in range(chance.choice([0, 1, 2])):
        data = bytewise(data, chance.choice(_SMALL), chance) or b"\x00"
    return data


def data_uri(number: int, seed: int) -> str:
    """An address of a picture, changed as text."""
    chance = random.Random(f"{seed}:uri:{number}")
    whole = "data:image/png;base64," + base64.b64encode(picture(chance)).decode()
    changed = bytewise(whole.encode(), b"http://127.0.0.1/file:///etc/passwd", chance)
    return changed.decode("utf-8", "surrogateescape")
