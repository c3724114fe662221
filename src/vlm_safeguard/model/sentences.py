"""Cuts a request into its sentences.

Harm in one sentence of many is weak in the hidden states at the end of the request: a story around
it, or harmless sentences behind it, hide it from a gate. Read by itself, the sentence shows it.
"""

from __future__ import annotations

import re
from itertools import groupby

MOST = 8  # parts of a text; a longer one is cut into parts of several sentences
SHORTEST = 3  # words of a part
# After the mark that ends a sentence or introduces one, also without a space before a capital
# letter, and at line breaks.
_END = re.compile(
    r"(?<=[.!?:…])[\"'”’»)\]]*\s+|(?<=[。！？：])|(?<!\s)\s*\n\s*|(?<=[^\W\d_A-Z]{2}[.!?])(?=[A-Z])"
)
_QUOTES = " \t\"'“”‘’«»"
_WORD = re.compile(r"\w+")
_UNSPACED = re.compile("[\u0e00-\u0eff\u2e80-\ud7ff\uf900-\ufaff]{4}")  # Thai, Chinese, Japanese


def sentences(text: str) -> list[str]:
    """The sentences of a text, each without quotation marks around it.

    Parts of fewer than three words that follow one another are one sentence, and left out if they
    have fewer together, unless the script writes no spaces between words. There are at most
    ``MOST`` parts. A text of one sentence has none: it needs no second reading.
    """
    pieces = [piece for part in _END.split(text) if (piece := part.strip(_QUOTES))]
    if len(pieces) < 2:
        return []
    groups = ((enough, list(group)) for enough, group in groupby(pieces, says_enough))
    parts = [part for enough, group in groups for part in (group if enough else [" ".join(group)])]
    parts = [part for part in parts if says_enough(part)]
    size = max(1, -(-len(parts) // MOST))
    return [" ".join(parts[n : n + size]) for n in range(0, len(parts), size)]


def says_enough(part: str) -> bool:
    """Whether a part has as many words as a sentence has."""
    return len(_WORD.findall(part)) >= SHORTEST or bool(_UNSPACED.search(part))
