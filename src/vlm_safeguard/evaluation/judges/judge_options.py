"""Parses the options in a judge's spec: ``?name=value&name=value`` at the end.

A spec stands in logs and results, so it never holds a key: ``key_variable`` names the environment
variable that does. For the same reason no message shows a value that was not asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args
from urllib.parse import unquote

from vlm_safeguard.evaluation.judges.endpoint import Family
from vlm_safeguard.evaluation.judges.guard_models import Answer
from vlm_safeguard.evaluation.judges.judgement import Asks, JudgeError
from vlm_safeguard.evaluation.judges.parse import Reading


def _one_of(known: Any) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in get_args(known):
            raise ValueError(f"use one of {', '.join(get_args(known))}")
        return text

    return read


def _text(text: str) -> str:
    if not text:
        raise ValueError("it is empty")
    return text


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
            raise ValueError(f"use a whole number of at least {least}")
        return int(text)

    return read


def _seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found < 1e6:
        raise ValueError("use a number of seconds")
    return found


_LOCAL: dict[str, Callable[[str], Any]] = {"dtype": _text, "device": _text, "batch": _whole(1)}
_ASKS = _one_of(Asks)
KNOWN: dict[str, dict[str, Callable[[str], Any]]] = {
    "endpoint": {
        "key_variable": _text,
        "family": _one_of(Family),
        "asks": _ASKS,
        "controversial": _one_of(Reading),
        "timeout": _seconds,
        "retries": _whole(0),
        "backoff": _seconds,
        "concurrency": _whole(1),
        "max_tokens": _whole(1),
    },
    "llama-guard": _LOCAL,
    "qwen3guard": {"asks": _ASKS, "controversial": _one_of(Reading), **_LOCAL},
    "prompt-file": {"answer": _one_of(Answer), "asks": _ASKS, **_LOCAL},
}
# How a judge is asked, not what it says: with these changed it is still the same judge.
_MANNER = {"key_variable", "timeout", "retries", "backoff", "concurrency", "dtype", "device"}
_MANNER |= {"batch"}


def split(spec: str) -> tuple[str, dict[str, Any]]:
    """A judge's spec without its options, and these as keyword arguments.

    They begin at the last ``?`` (after the ``#``, where the judge has one). Values are
    percent-decoded. A judge without options (``recorded:FILE``) keeps its ``?``.

    Raises:
        JudgeError: an option is not the judge's, comes twice, or has a value of the wrong kind.
    """
    kind = spec.partition(":")[0]
    known = KNOWN.get(kind, {})
    cut = spec.rfind("?")
    if not known or cut < 0 or "#" in spec[cut:]:
        return spec, {}
    found: dict[str, Any] = {}
    for part in spec[cut + 1 :].split("&"):
        name, equals, value = part.partition("=")
        if not equals:
            raise JudgeError(
                f"options of the judge {kind} are written name=value, with & between them; its "
                f"options are {', '.join(known)}"
            )
        if name not in known:
            raise JudgeError(
                f"the judge {kind} has no option {name!r}: its options are {', '.join(known)}"
            )
        if name in found:
            raise JudgeError(f"the option {name} of the judge {kind} is given twice")
        try:
            found[name] = known[name](unquote(value, errors="strict"))
        except ValueError as error:
            raise JudgeError(f"the option {name} of the judge {kind}: {error}") from error
    return spec[:cut], found


def same_judge(first: str, second: str) -> bool:
    """Whether two specs name one judge, however it is asked (its timeout, its batches).

    Raises:
        JudgeError: see ``split``.
    """
    (one, these), (other, those) = split(first), split(second)
    said, again = (
        {name: value for name, value in given.items() if name not in _MANNER}
        for given in (these, those)
    )
    return one == other and said == again
