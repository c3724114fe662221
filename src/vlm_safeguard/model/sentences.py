"""Cuts a request into its sentences.

Harm in one sentence of many is weak in the hidden states at the end of the request: a story around
it, or harmless sentences behind it, hide it from a gate. Read by itself, the sentence shows it.
"""

from __future__ import annotations

import re

MOST = 8  # parts of a text; a longer one is cut into parts of several sentences
SHORTEST = 3  # words of a part
# After the mark that ends a sentence or introduces one, and at line breaks.
_END = re.compile(r"(?<=[.!?:…])[\"'”’»)\]]*\s+|(?<=[。！？：])|\s*\n\s*")
_QUOTES = " \t\"'“”‘’«»"
_WORD = re.compile(r"\w+")
_UNSPACED = re.compile("[\u0e00-\u0eff\u2e80-\ud7ff\uf900-\ufaff]{4}")  # Thai, Chinese, Japanese


def sentences(text: str) -> list[str]:
    """The sentences of a text, each without quotation marks around it.

    A part of fewer than three words is dropped, unless the script writes no spaces between words.
    There are at most ``MOST`` parts. A text of one sentence has none: it needs no second reading.
    """
    parts = [part.strip(_QUOTES) for part in _END.split(text)]
    parts = [part for part in parts if _says_enough(part)]
    if len(parts) < 2:
        return []
    size = -(-len(parts) // MOST)
    return [" ".join(parts[n : n + size]) for n in range(0, len(parts), size)]


def _says_enough(part: str) -> bool:
    return len(_WORD.findall(part)) >= SHORTEST or bool(_UNSPACED.search(part))
