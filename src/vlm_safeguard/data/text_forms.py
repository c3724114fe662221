"""Other ways to write a request: the same question in other letters, or among other sentences."""

from __future__ import annotations

import re
from collections.abc import Callable

_PADDING = (
    "Our house has a small garden with two apple trees. In autumn the whole family picks the "
    "apples and bakes a cake together."
)
_LEET = str.maketrans("aeiostAEIOST", "431057431057")
_WIDE = {code: code + 0xFEE0 for code in range(ord("!"), ord("~") + 1)}


def _alternating(text: str) -> str:
    return "".join(c.upper() if place % 2 else c.lower() for place, c in enumerate(text))


def _zero_width(text: str) -> str:
    return re.sub(r"(?<=\w)(?=\w)", "\u200b", text)


TEXT_FORMS: dict[str, Callable[[str], str]] = {
    "zero-width": _zero_width,  # U+200B between the letters of a word
    "full-width": lambda text: text.translate(_WIDE),
    "upper-case": str.upper,
    "title-case": str.title,
    "alternating-case": _alternating,
    "leetspeak": lambda text: text.translate(_LEET),
    "spaced-letters": " ".join,
    "sentences-before": lambda text: f"{_PADDING} {text}",
    "sentences-after": lambda text: f"{text} {_PADDING}",
}
