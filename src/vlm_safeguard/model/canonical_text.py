"""The canonical form of a text: no invisible characters, letters and spelling as usual.

A zero-width space inside a word, letters of full width, aLtErNaTiNg CaSe, l337 or s p a c e d
letters hide harm from a gate, and the model may still understand the request. Letters of another
alphabet that look alike are left as they are.
"""

from __future__ import annotations

import re
import unicodedata

# Unicode's Default_Ignorable_Code_Point, in so far as it is not a format character.
_IGNORABLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2060-\u206f\u3164\ufe00-\ufe0f\uffa0\ufff0-\ufff8"
    "\U000e0000-\U000e0fff]"
)
# Invisible, but between words where nothing else is: a word would be longer than ``LONGEST``.
_BREAKS = re.compile("[\u200b\r\x0b\x0c\x1c-\x1f\x85]+")
LONGEST = 20
# An odd spelling is changed where it is found in so many words: one alone may be a name.
OFTEN = 3
_SPACED = re.compile(r"(?<!\S)\S(?: {1,3}\S){5,}(?!\S)")  # single characters, words 2 or 3 apart
_LEET = re.compile(r"(?<![^\W_])(?=[\w@$]*[^\W\d_])(?=\w*[013457@$])[\w@$]+")
_LETTERS = str.maketrans("013457@$", "oieastas")
_WORD = re.compile(r"[^\W\d_]+")
_SHOUTED = re.compile(r"\b[^\W\d_a-z]+\b")
_MIXED = re.compile(r"\w*[a-z][A-Z]\w*")


def canonical_text(text: str) -> str:
    """``text`` without invisible characters, in the normal form NFKC, in its usual spelling.

    Default-ignorable, control and format characters are invisible. Line feeds and tabs stay, and a
    zero-width space becomes a space where words would run together. Spaces between single letters
    are taken out, digits within words become the letters that they look like, and words with
    capital letters behind small ones are written small. In a text that is mostly in capitals, these
    are written small too.
    """
    if not (text.isascii() and text.replace("\n", "").replace("\t", "").isprintable()):
        visible = _visible(text)
        run_together = max(map(len, visible.split()), default=0) > LONGEST
        text = _visible(_BREAKS.sub(" ", text)) if run_together else visible
    text = _SPACED.sub(lambda found: _joined(found[0]), text)
    for odd, usual in (
        (_LEET, lambda found: found[0].translate(_LETTERS)),
        (_MIXED, lambda found: found[0].lower()),
    ):
        if len(odd.findall(text)) >= OFTEN:
            text = odd.sub(usual, text)
    return _SHOUTED.sub(lambda found: found[0].lower(), text) if _is_loud(text) else text


def _is_loud(text: str) -> bool:
    """Whether at least two in three words are in capitals, of those with two letters or more."""
    words = [word for word in _WORD.findall(text) if len(word) > 1]
    loud = sum(word.isupper() for word in words)
    return loud >= OFTEN and 3 * loud >= 2 * len(words)


def _joined(spaced: str) -> str:
    return " ".join(word.replace(" ", "") for word in re.split(" {2,}", spaced))


def _visible(text: str) -> str:
    """In NFKC, without invisible characters; NFKC may bring new ones in."""
    return _stripped(unicodedata.normalize("NFKC", _stripped(text)))


def _stripped(text: str) -> str:
    return "".join(
        character
        for character in _IGNORABLE.sub("", text)
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf")
    )
