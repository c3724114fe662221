"""Utility from lmms-eval: the results files it writes, side by side.

lmms-eval (github.com/EvolvingLMMs-Lab/lmms-eval) leaves one ``..._results.json`` for each run.
Under ``results`` a task has ``"METRIC,FILTER"`` and ``"METRIC_stderr,FILTER"`` entries, the error
being "N/A" where it knows none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_safeguard.errors import DataError
from vlm_safeguard.utils.jsonl import read_object

# The other standard errors (_clt, _clustered) may be of a sample's score, not of the metric.
_SPREAD = re.compile(r".+_stderr(_clt|_clustered)?")

Key = tuple[str, str]  # task, "metric,filter"


@dataclass(frozen=True)
class Score:
    """A metric of a task; ``error`` is its standard error, None where it is unknown."""

    value: float
    error: float | None


@dataclass(frozen=True)
class LmmsRun:
    """One results file.

    Attributes:
        name: What to call it.
        model: The model's name in the file, "" if there is none.
        scores: What it measured.
        samples: Samples of each task, where the file says so.
        setup: Of each task what must be the same for a comparison: version, shots, data set.
        lower_is_better: Metrics that are better if lower.
        left_out: Metrics without a single finite number.
    """

    name: str
    model: str
    scores: dict[Key, Score]
    samples: dict[str, int]
    setup: dict[str, dict[str, Any]]
    lower_is_better: frozenset[Key]
    left_out: tuple[Key, ...]


def read_lmms(path: Path, name: str | None = None) -> LmmsRun:
    """A results file of lmms-eval.

    Raises:
        DataError: the file is missing, no JSON, none of lmms-eval's, or without a single metric.
    """
    facts = read_object(path, "results")
    tasks = facts.get("results")
    if not isinstance(tasks, dict) or not all(isinstance(one, dict) for one in tasks.values()):
        raise DataError(f"{path} is no results file of lmms-eval: 'results' should hold tasks")
    scores: dict[Key, Score] = {}
    left_out: list[Key] = []
    for task, entries in tasks.items():
        for key, value in entries.items():
            metric, comma, kind = key.partition(",")
            if not comma or _SPREAD.fullmatch(metric):
                continue  # an alias, or a spread, which is read beside its metric
            number = _number(value)
            if number is None:
                left_out.append((task, key))
            else:
                scores[task, key] = Score(number, _number(entries.get(f"{metric}_stderr,{kind}")))
    if not scores:
        raise DataError(f"{path} holds no metric with a number: was the run only to predict?")
    return LmmsRun(
        name=name or path.stem,
        model=str(facts.get("model_name") or ""),
        scores=scores,
        samples={
            task: count["effective"]
            for task, count in _dict(facts, "n-samples").items()
            if isinstance(count, dict) and isinstance(count.get("effective"), int)
        },
        setup={task: _setup(facts, task) for task in tasks},
        lower_is_better=frozenset(
            (task, key)
            for task, key in scores
            if _dict(_dict(facts, "higher_is_better"), task).get(key.partition(",")[0]) is False
        ),
        left_out=tuple(left_out),
    )


def compare_lmms(runs: Sequence[LmmsRun]) -> list[dict[str, Any]]:
    """A row for each metric: every run's score, and its difference from the first run's.

    The error of a difference takes the two scores as independent, sqrt(a^2 + b^2). On the same
    questions they go together, so that it is too large rather than too small.

    Raises:
        DataError: fewer than two runs, two of one name, or runs that cannot be compared: other
            tasks, numbers of samples, versions or data.
    """
    if len(runs) < 2:
        raise DataError("name two results files at least: there is nothing to compare")
    names = [run.name for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise DataError(f"two results are called {twice!r}: tell them apart with --name")
    first = runs[0]
    for other in runs[1:]:
        _check_alike(first, other)
    return [
        {
            "task": key[0],
            "metric": key[1],
            "n": first.samples.get(key[0]),
            "lower_is_better": key in first.lower_is_better,
            "runs": {run.name: _against(first.scores[key], run.scores[key]) for run in runs},
        }
        for key in first.scores
    ]


def lmms_page(runs: Sequence[LmmsRun], rows: Sequence[dict[str, Any]]) -> str:
    """``compare_lmms`` as a table in Markdown."""
    first, *others = [run.name for run in runs]
    head = ["task", "metric", "n", first]
    for name in others:
        head += [name, "difference"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [row["task"], row["metric"].removesuffix(",none"), str(row["n"] or "")]
        cells[1] += " (lower is better)" if row["lower_is_better"] else ""
        for name, one in row["runs"].items():
            cells.append(_shown(one["value"], one["error"], ""))
            if name != first:
                cells.append(_shown(one["difference"], one["difference_error"], "+"))
        lines.append(cells)
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    notes = [
        f"Results of lmms-eval, with standard errors; differences from {first}, whose errors take "
        "the two runs as independent (on the same questions: too large rather than too small)."
    ]
    missing = dict.fromkeys(" ".join(key) for run in runs for key in run.left_out)
    if missing:
        notes.append(f"Without a single number, and left out: {', '.join(missing)}.")
    return "\n\n".join([table, *notes]) + "\n"


def _shown(value: float, error: float | None, sign: str) -> str:
    return format(value, f"{sign}.4g") + ("" if error is None else f" ± {error:.2g}")


def _against(first: Score, other: Score) -> dict[str, float | None]:
    known = first.error is not None and other.error is not None
    return {
        "value": other.value,
        "error": other.error,
        "difference": other.value - first.value,
        "difference_error": math.hypot(first.error or 0, other.error or 0) if known else None,
    }


def _check_alike(first: LmmsRun, other: LmmsRun) -> None:
    """Refuse what would be a difference of something else than the model."""
    odd = sorted(first.scores.keys() ^ other.scores.keys())
    if odd:
        holder = first if odd[0] in first.scores else other
        raise DataError(
            f"only {holder.name} has {' '.join(odd[0])}: {first.name} and {other.name} must be "
            "runs of the same tasks"
        )
    for task in dict.fromkeys(task for task, _ in first.scores):
        counts = first.samples.get(task), other.samples.get(task)
        if counts[0] != counts[1]:
            raise DataError(
                f"{task}: {first.name} has {counts[0]} samples, {other.name} has {counts[1]}"
            )
        for what, value in first.setup[task].items():
            theirs = other.setup[task][what]
            if value != theirs:
                raise DataError(
                    f"{task}: {what} is {value!r} in {first.name} and {theirs!r} in {other.name}"
                )


def _setup(facts: dict[str, Any], task: str) -> dict[str, Any]:
    config = _dict(_dict(facts, "configs"), task)
    return {
        "version": _dict(facts, "versions").get(task),
        "number of shots": _dict(facts, "n-shot").get(task),
        "data set": [config.get(name) for name in ("dataset_path", "dataset_name", "test_split")],
    }


def _dict(facts: dict[str, Any], name: str) -> dict[str, Any]:
    """The object at ``name``; an empty one where older versions write none."""
    found = facts.get(name)
    return found if isinstance(found, dict) else {}


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None
