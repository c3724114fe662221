"""The canonical form of a text: no invisible characters, letters and spelling as usual.

A zero-width space inside a word, letters of full width, aLtErNaTiNg CaSe, l337 or s p a c e d
letters hide harm from a gate, and the model may still understand the request. Letters of another
alphabet that look alike are left as they are.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable
from typing import Any

# Unicode's Default_Ignorable_Code_Point, in so far as it is not a format character.
_IGNORABLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2060-\u206f\u3164\ufe00-\ufe0f\uffa0\ufff0-\ufff8"
    "\U000e0000-\U000e0fff]"
)
# Invisible, but between words where nothing else is: a word would be longer than ``LONGEST``.
_BREAKS = re.compile("[\u200b\r\x0b\x0c\x1c-\x1f\x85]+")
LONGEST = 20
# Line breaks of other systems, and invisible ones that are not inside a word.
_LINES = re.compile(r"\r\n|[\u2028\u2029]|(?<=\W)[\r\x0b\x0c\x85]+|[\r\x0b\x0c\x85]+(?=\W)")
# An odd spelling is changed where it is found in so many words: one alone may be a name.
OFTEN = 3
_SPACED = re.compile(r"(?<!\S)\S(?: {1,3}\S){5,}(?!\S)")  # single characters, words 2 or 3 apart
# Four single letters, which digits may stand for inside, apart by one and the same: three may be a
# name, as U-S-A.
_SPELLED = re.compile(
    r"(?<![^\W_])(?<!['’])[^\W\d_]( {1,3}|[._*-])(?:[^\W\d_]|[013457@$])"
    r"(?:\1(?:[^\W\d_]|[013457@$]))+\1[^\W\d_](?!['’]?[^\W_])"
)
# A digit before a small letter, in a word of three letters or more, is odd enough even in one word:
# b0mb, and not H2O, CH3OH or i18n.
_CLEAR = re.compile(r"[^\W\d_][013457]+[^\W\d_A-Z]")
_LEET = re.compile(r"[013457@$]")
_LETTERS = str.maketrans("013457@$", "oieastas")
_LETTER = re.compile(r"[^\W\d_]")
_WORD = re.compile(r"[^\W\d_]+")
_SHOUTED = re.compile(r"\b[^\W_a-z]+\b")
_MIXED = re.compile(r"[a-z][A-Z]")
# Words as each odd spelling has them: found whole and looked into, which takes linear time.
_WITH_DIGITS, _WITH_SIGNS, _WITH_ALL = map(re.compile, (r"[^\W_]+", r"[\w@$]+", r"\w+"))


def canonical_text(text: str) -> str:
    """``text`` without invisible characters, in the normal form NFKC, in its usual spelling.

    Default-ignorable, control and format characters are invisible. Line feeds and tabs stay, other
    line breaks become line feeds, and a zero-width space becomes a space where words would run
    together. What stands between single letters (spaces, hyphens, dots) is taken out, digits within
    words become the letters that they look like, and words with capital letters behind small ones
    are written small. In a text that is mostly in capitals, these are written small too.
    """
    while (usual := _usual(text)) != text:  # each way of writing may hide another
        text = usual
    return text


def _usual(text: str) -> str:
    if not (text.isascii() and text.replace("\n", "").replace("\t", "").isprintable()):
        text = _LINES.sub("\n", text)
        visible = _visible(text)
        run_together = max(map(len, visible.split()), default=0) > LONGEST
        text = _visible(_BREAKS.sub(" ", text)) if run_together else visible
    text = _SPACED.sub(lambda found: _joined(found[0], " "), text)
    text = _SPELLED.sub(lambda found: _joined(found[0], found[1][0]), text)
    text = _respelled(text, _WITH_SIGNS, _is_leet, _unleet, OFTEN)
    text = _respelled(text, _WITH_ALL, _MIXED.search, str.lower, OFTEN)
    text = _respelled(text, _WITH_DIGITS, _is_clear, _unleet, 1)
    return _SHOUTED.sub(lambda found: found[0].lower(), text) if _is_loud(text) else text


def _respelled(
    text: str,
    words: re.Pattern[str],
    odd: Callable[[str], Any],
    usual: Callable[[str], str],
    often: int,
) -> str:
    """``text`` with its odd words in their usual spelling, if there are so many or more."""
    if sum(bool(odd(word)) for word in words.findall(text)) < often:
        return text
    return words.sub(lambda found: usual(found[0]) if odd(found[0]) else found[0], text)


def _is_leet(word: str) -> bool:
    return bool(_LEET.search(word) and _LETTER.search(word))


def _is_clear(word: str) -> bool:
    return bool(_CLEAR.search(word)) and len(_LETTER.findall(word)) >= 3


def _unleet(word: str) -> str:
    return word.translate(_LETTERS)


def _is_loud(text: str) -> bool:
    """Whether at least two in three words are in capitals, of those with two letters or more."""
    words = [word for word in _WORD.findall(text) if len(word) > 1]
    loud = sum(word.isupper() for word in words)
    return loud >= OFTEN and 3 * loud >= 2 * len(words)


def _joined(spelled: str, apart: str) -> str:
    """Single letters as words: what is ``apart`` by more than the narrowest gap is another word.

    A row of the alphabet (a b c d) is a list.
    """
    if re.sub(r"[\W_]", "", spelled).lower() in string.ascii_lowercase:
        return spelled
    narrowest = min(map(len, re.findall(re.escape(apart) + "+", spelled)))
    words = re.split(f"{re.escape(apart)}{{{narrowest + 1},}}", spelled)
    return apart.join(word.replace(apart, "") for word in words)


def _visible(text: str) -> str:
    """In NFKC, without invisible characters; NFKC may bring new ones in."""
    return _stripped(unicodedata.normalize("NFKC", _stripped(text)))


def _stripped(text: str) -> str:
    return "".join(
        character
        for character in _IGNORABLE.sub("", text)
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf")
    )
