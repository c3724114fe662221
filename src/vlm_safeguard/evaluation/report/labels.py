"""Display names and number formats of the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vlm_safeguard.utils.stats import with_interval

SETTING_NAMES = {"text": "text only", "blank": "blank image", "picture": "picture"}
SETTING_PHRASES = {
    "text": "as text only",
    "blank": "with a blank image",
    "picture": "with a picture",
}
MODEL_NAMES = {"unguarded": "no guard", "guarded": "guarded", "paper": "paper's formula"}
RESPONSE_WORDS = 12  # of each response: no answer to a harmful question is passed on
MISSING = "–"


def cut_words(text: str, count: int) -> str:
    """The first ``count`` words of ``text``, with an ellipsis where something was left off.

    Scripts without spaces have no words to count: there, ``12 * count`` characters are the limit.
    """
    words = text.split()
    cut = " ".join(words[:count])
    shorter = cut[: 12 * count]
    left_off = len(words) > count or len(shorter) < len(cut)
    return shorter.rstrip() + (" …" if left_off else "")


def finite(value: object) -> float | None:
    """``value`` if it is a finite number: NaN in the data must not reach the page."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def percent(value: object) -> str:
    number = finite(value)
    return MISSING if number is None else f"{number:.1%}"


def show(value: object, form: str) -> str:
    number = finite(value)
    return MISSING if number is None else format(number, form)


def rate_and_interval(measured: Mapping[str, Any], name: str) -> str:
    """A rate with its interval."""
    value = finite(measured.get(name))
    low, high = finite(measured.get(f"{name}_low")), finite(measured.get(f"{name}_high"))
    if value is None or low is None or high is None:
        return percent(value)
    return with_interval(value, low, high)


def known_settings(found: Mapping[str, Any] | None) -> list[str]:
    """The settings that ``found`` has, in the order of the paper."""
    return [name for name in SETTING_NAMES if (found or {}).get(name)]


def rank_candidates(calibration: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Candidates, the chosen one first: the second round decides, then the first one."""

    def rate(candidate: Mapping[str, Any], name: str) -> float:
        found = finite(candidate.get(name))
        return math.inf if found is None else found

    tried = [c for c in calibration.get("candidates") or [] if rate(c, "asr") < math.inf]
    return sorted(tried, key=lambda c: (not c.get("chosen"), rate(c, "final_asr"), rate(c, "asr")))


def candidate_name(candidate: Mapping[str, Any]) -> str:
    """What tells this candidate from the others."""
    steering = candidate["steering"]
    if steering.get("mode") == "add":
        kind = f"add α={steering.get('alpha', 0):g}, {steering.get('query')} query"
    else:
        kind = f"{steering.get('mode')} to {steering.get('reference')}"
    if steering.get("positions") == "all":
        kind += ", all positions"
    tokens = steering.get("tokens")
    dose = "all tokens" if tokens is None else f"{tokens} token{'s' if tokens != 1 else ''}"
    if steering.get("later") == "refusal":
        dose += ", later ones as in refusals"
    return f"{kind}, layers {steering.get('layers')}, rank {steering.get('rank')}, {dose}"
