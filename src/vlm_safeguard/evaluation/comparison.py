"""Compares systems on the same prompts with the same decoding; one row per response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_safeguard.calibration.generation import Response, respond
from vlm_safeguard.calibration.refusals import Verdict, judge
from vlm_safeguard.data import prompts
from vlm_safeguard.data.inputs import SETTINGS, Setting, requests, settings_of
from vlm_safeguard.data.prompts import Prompt
from vlm_safeguard.data.sampling import thin
from vlm_safeguard.errors import DataError
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.utils.progress import Progress
from vlm_safeguard.utils.stats import Rate, clustered_wilson

Systems = dict[str, Guard | None]


@dataclass(frozen=True)
class Row:
    """One judged response."""

    system: str
    setting: Setting
    benchmark: str
    prompt: Prompt
    response: Response
    verdict: Verdict


def own_sets(per_set: int | None = None) -> dict[str, list[Prompt]]:
    """The package's three evaluation sets; ``per_set`` takes that many of each label, of as
    many questions as it can."""
    sets = {}
    for kind in ("malicious", "jailbreak", "picture"):
        items = prompts.evaluation(kind)
        sets[kind] = items if per_set is None else thin(items, per_set)
    return sets


def read_prompts(path: Path, label: prompts.Label = "harmful") -> list[Prompt]:
    """A text file of prompts, one a line (the format of MaliciousInstruct).

    Raises:
        DataError: the file is missing, no UTF-8 text, or holds no prompt.
    """
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except OSError as error:
        raise DataError(f"cannot read the prompts {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a UTF-8 text file of prompts, one a line") from error
    found = [line for line in lines if line]
    if not found:
        raise DataError(f"{path} has no prompts")
    return [
        Prompt(f"{path.stem}-{n:04}", text, label, "plain", "", f"{path.stem}-{n:04}")
        for n, text in enumerate(found)
    ]


def compare(
    loaded: LoadedModel,
    systems: Systems,
    sets: dict[str, list[Prompt]],
    *,
    max_new_tokens: int = 32,
    batch: int = 32,
    progress: Progress | None = None,
) -> list[Row]:
    """Every prompt through every system in each of its settings."""
    rows: list[Row] = []
    for setting in SETTINGS:
        chosen = [
            (name, prompt)
            for name, items in sets.items()
            for prompt in items
            if setting in settings_of(prompt)
        ]
        for system, guard in systems.items():
            answers = respond(
                loaded,
                requests([prompt for _, prompt in chosen], setting),
                guard,
                max_new_tokens=max_new_tokens,
                batch=batch,
                what=f"{system}, {setting}",
                progress=progress,
            )
            rows += [
                Row(system, setting, name, prompt, answer, judge(answer.text))
                for (name, prompt), answer in zip(chosen, answers, strict=True)
            ]
    return rows


def rates(rows: Sequence[Row]) -> dict[str, Any]:
    """ASR on the harmful rows, over-refusal on the harmless ones, with Wilson intervals in which
    the copies of one question, in many templates, go together.

    A degenerate or empty response is no refusal and no attack success either: it is counted as
    ``degenerate``, apart, over harmful and harmless rows together.
    """
    harmful = [row for row in rows if row.prompt.harmful]
    harmless = [row for row in rows if not row.prompt.harmful]
    asr, refused = _rate(harmful, "complied"), _rate(harmful, "refused")
    over = _rate(harmless, "refused")
    garbled = sum(r.verdict in ("degenerate", "empty") for r in rows)
    fired = [r.response.fired for r in rows if r.response.fired is not None]
    return {
        "n": len(rows),
        "asr": asr.value if harmful else None,
        "asr_low": asr.low,
        "asr_high": asr.high,
        "refused": refused.value if harmful else None,
        "refused_low": refused.low,
        "refused_high": refused.high,
        "n_harmful": asr.n,
        "over_refusal": over.value if harmless else None,
        "over_refusal_low": over.low,
        "over_refusal_high": over.high,
        "n_harmless": over.n,
        "degenerate": garbled / len(rows) if rows else None,
        "fired_harmful": _share(harmful) if fired else None,
        "fired_harmless": _share(harmless) if fired else None,
    }


def _rate(rows: Sequence[Row], verdict: Verdict) -> Rate:
    hits = [row.verdict == verdict for row in rows]
    return clustered_wilson(hits, [row.prompt.cluster for row in rows])


def _share(rows: Sequence[Row]) -> float | None:
    return sum(bool(row.response.fired) for row in rows) / len(rows) if rows else None


def table(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, Any]]]:
    """``{setting: {system: rates}}`` over all benchmarks together."""
    systems = list(dict.fromkeys(row.system for row in rows))
    return {
        setting: {
            system: rates([r for r in rows if (r.setting, r.system) == (setting, system)])
            for system in systems
        }
        for setting in SETTINGS
        if any(row.setting == setting for row in rows)
    }


def by_benchmark(rows: Sequence[Row]) -> dict[str, Any]:
    """``{benchmark: {setting: {system: rates}}}``."""
    names = list(dict.fromkeys(row.benchmark for row in rows))
    return {name: table([row for row in rows if row.benchmark == name]) for name in names}
