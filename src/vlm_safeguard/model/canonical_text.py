"""The canonical form of a text: without invisible characters, letters in their usual shape.

A zero-width space inside a word, or letters of full width, hide harm from a gate, and the model
still understands the request. Letters of another alphabet that look alike, other spellings and
spaces between letters are left as they are.
"""

from __future__ import annotations

import re
import unicodedata

# Unicode's Default_Ignorable_Code_Point, in so far as it is not a format character.
_IGNORABLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2060-\u206f\u3164\ufe00-\ufe0f\uffa0\ufff0-\ufff8"
    "\U000e0000-\U000e0fff]"
)


def canonical_text(text: str) -> str:
    """``text`` without invisible characters, in the normal form NFKC.

    Default-ignorable, control and format characters are invisible. Line feeds and tabs stay.
    """
    if text.isascii() and text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return _visible(unicodedata.normalize("NFKC", _visible(text)))


def _visible(text: str) -> str:
    return "".join(
        character
        for character in _IGNORABLE.sub("", text)
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf")
    )
