"""Validates a judge on labelled responses, and corrects rates for its errors.

A judge is held against responses that people labelled, those to harmful and those to harmless
prompts apart: there it is to find attack successes, here refusals, and it errs otherwise. Its
sensitivity and specificity for attack success then correct the rates it gives elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from vlm_safeguard.errors import DataError
from vlm_safeguard.evaluation.judges.judgement import Asks, Judge
from vlm_safeguard.utils.jsonl import read_rows, text_of
from vlm_safeguard.utils.stats import Rate, wilson

Label = Literal["refused", "complied", "off_subject", "degenerate"]
Prompts = Literal["harmful", "harmless"]
SOUGHT: dict[Prompts, Label] = {"harmful": "complied", "harmless": "refused"}  # what is positive
OUTCOMES = ("refused", "complied", "degenerate", "empty", "off_subject", "unscored")


@dataclass(frozen=True)
class Labelled:
    """A response with the label people gave it.

    Attributes:
        harmful: Whether the prompt is; the only ones that attack success is about.
        judge: The judge whose verdicts the responses were chosen by, if they were: they tell
            nothing of another.
    """

    prompt: str
    response: str
    label: Label
    harmful: bool = True
    judge: str = ""


@dataclass(frozen=True)
class Validation:
    """A judge against labels of responses to one kind of prompts.

    Attributes:
        judge, asks: Whose verdicts, and on what (see ``judgement.Asks``).
        prompts: "harmful", where attack successes are sought (label "complied"), or "harmless",
            where refusals are.
        n: Labelled responses to them.
        confusion: ``{label: {verdict: count}}`` over all of them; verdicts are ``OUTCOMES``.
        unscored: How many the judge did not score. They count in neither rate below.
        reasons: The reasons of the unscored, with their counts.
        sensitivity: Share of what is sought that it called so, with its Wilson interval.
        specificity: Share of the others it called anything else.
        kappa: Cohen's kappa of sought or not, over scored responses; None where judge and labels
            agree by necessity (all of one kind) and it has no value.
        kappa_low, kappa_high: Its 95% bootstrap interval; None with it.
    """

    judge: str
    asks: Asks
    prompts: Prompts
    n: int
    confusion: dict[str, dict[str, int]]
    unscored: int
    reasons: dict[str, int]
    sensitivity: Rate
    specificity: Rate
    kappa: float | None
    kappa_low: float | None
    kappa_high: float | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = asdict(self)
        for name in ("sensitivity", "specificity"):
            found[name] = getattr(self, name).as_dict()
        return found


def read_labelled(path: Path) -> list[Labelled]:
    """Labelled responses from JSONL with the keys ``prompt``, ``response``, ``label``.

    ``label`` is "refused", "complied", "off_subject" (neither help nor a refusal) or "degenerate";
    HarmBench's 1 (attack success) is read as "complied" and its 0 as "refused". Optional keys are
    ``prompt_label`` ("harmful", the default, or "harmless") and ``judge`` (see ``Labelled``).

    Raises:
        DataError: the file is missing, broken (with the line) or empty, a key is missing, a label
            is unknown, or a pair of prompt and response comes twice.
    """
    found: list[Labelled] = []
    seen: dict[tuple[str, str], int] = {}
    for number, row in read_rows(path, "labelled responses", ("prompt", "response", "label")):
        where = f"{path}, line {number}"
        label = row["label"]
        if type(label) is int and label in (0, 1):
            label = "complied" if label else "refused"
        if label not in get_args(Label):
            raise DataError(
                f"{where}: unknown label {label!r}: use one of {', '.join(get_args(Label))}, 0, 1"
            )
        kind = row.get("prompt_label", "harmful")
        if kind not in ("harmful", "harmless"):
            raise DataError(f"{where}: unknown prompt_label {kind!r}: use harmful or harmless")
        item = Labelled(
            text_of(row, "prompt", where),
            text_of(row, "response", where),
            label,
            harmful=kind == "harmful",
            judge=text_of({"judge": "", **row}, "judge", where),
        )
        first = seen.setdefault((item.prompt, item.response), number)
        if first != number:
            raise DataError(f"{where}: the same prompt and response as in line {first}")
        found.append(item)
    return found


def validate(
    judge: Judge,
    rows: Sequence[Labelled],
    prompts: Prompts = "harmful",
) -> Validation:
    """Hold ``judge`` against the labelled responses to ``prompts`` among ``rows``.

    The bootstrap resamples responses (percentile interval); it takes them as independent, so
    labels of many answers to few prompts give an interval that is too narrow.

    Raises:
        DataError: there are none, or the judge tells harm and the prompts are harmless: what it
            says there is no refusal.
    """
    rows = [row for row in rows if row.harmful == (prompts == "harmful")]
    if not rows:
        raise DataError(f"no labelled responses to {prompts} prompts to validate a judge on")
    if prompts == "harmless" and judge.asks == "harm":
        raise DataError(
            f"{judge.name} judges harm, not refusals: only responses to harmful prompts validate it"
        )
    judged = judge.judge([(row.prompt, row.response) for row in rows])
    confusion = {label: dict.fromkeys(OUTCOMES, 0) for label in get_args(Label)}
    for row, found in zip(rows, judged, strict=True):
        confusion[row.label][found.verdict or "unscored"] += 1

    def count(labels: Sequence[str], verdicts: Sequence[str]) -> int:
        return sum(confusion[label][verdict] for label in labels for verdict in verdicts)

    sought = SOUGHT[prompts]
    negative = [label for label in get_args(Label) if label != sought]
    other = [verdict for verdict in OUTCOMES if verdict not in (sought, "unscored")]
    hits, misses = count((sought,), (sought,)), count((sought,), other)
    alarms, rejections = count(negative, (sought,)), count(negative, other)
    kappa, low, high = cohen_kappa(((hits, misses), (alarms, rejections)))
    return Validation(
        judge=judge.name,
        asks=judge.asks,
        prompts=prompts,
        n=len(rows),
        confusion=confusion,
        unscored=count(get_args(Label), ("unscored",)),
        reasons=dict(Counter(found.reason for found in judged if found.verdict is None)),
        sensitivity=wilson(hits, hits + misses),
        specificity=wilson(rejections, alarms + rejections),
        kappa=kappa,
        kappa_low=low,
        kappa_high=high,
    )


def validation_page(success: Validation, refusals: Validation | None, harmless: int) -> str:
    """Both parts as text: attack success found, then refusals of harmless prompts.

    Args:
        refusals: None where the judge was not asked for them.
        harmless: Labelled responses to harmless prompts.
    """
    parts = [f"judge        {success.judge}", _part("attack success on harmful prompts", success)]
    if refusals:
        parts.append(_part("refusals of harmless prompts", refusals))
    elif harmless:
        parts.append(
            f"{harmless} responses to harmless prompts left out: this judge tells harm, not "
            "refusals"
        )
    return "\n\n".join(parts) + "\n"


def _part(what: str, found: Validation) -> str:
    kappa = "none" if found.kappa is None else f"{found.kappa:.2f}"
    if found.kappa_low is not None:
        kappa += f" [{found.kappa_low:.2f}, {found.kappa_high:.2f}]"
    rates = [str(r) if r.n else "none" for r in (found.sensitivity, found.specificity)]
    return (
        f"{what}: {found.n} labelled responses\n"
        f"sensitivity  {rates[0]}\nspecificity  {rates[1]}\n"
        f"kappa        {kappa}\nunscored     {found.unscored}"
    )


def cohen_kappa(
    table: tuple[tuple[int, int], tuple[int, int]], resamples: int = 2000
) -> tuple[float | None, float | None, float | None]:
    """Cohen's kappa (1960) of a 2x2 table of counts, with its 95% bootstrap interval.

    Drawing n responses with replacement is drawing the table from a multinomial distribution.
    Resamples without a kappa (all of one kind) are left out. All None if the table has none.
    """
    counts = np.array(table, dtype=float)
    n = counts.sum()
    if n == 0:
        return None, None, None
    value = _kappa(counts[None] / n)[0]
    if np.isnan(value):
        return None, None, None
    generator = np.random.default_rng(0)
    drawn = generator.multinomial(int(n), counts.ravel() / n, size=resamples).reshape(-1, 2, 2)
    low, high = np.nanquantile(_kappa(drawn / n), (0.025, 0.975))
    return float(value), float(low), float(high)


def _kappa(tables: np.ndarray) -> np.ndarray:
    """Kappa of tables of shares, shape (k, 2, 2) -> (k,); NaN where chance agreement is 1.

    scikit-learn's ``cohen_kappa_score`` takes one table at a time, which is too slow to resample.
    """
    observed = tables[:, 0, 0] + tables[:, 1, 1]
    chance = (tables.sum(2) * tables.sum(1)).sum(1)
    room = 1 - chance
    return np.where(room > 1e-12, (observed - chance) / np.where(room > 1e-12, room, 1), np.nan)


@dataclass(frozen=True)
class CorrectedRate:
    """A rate corrected for the judge's errors. ``value`` None: no correction, ``reason`` why."""

    value: float | None
    low: float
    high: float
    reason: str = ""


def corrected_rate(
    count: int,
    n: int,
    sensitivity: Rate,
    specificity: Rate,
    *,
    effective: float | None = None,
    draws: int = 20_000,
    seed: int = 0,
) -> CorrectedRate:
    """The true rate behind ``count`` of ``n`` that a judge of known errors called "complied".

    Rogan and Gladen (1978): (observed + specificity - 1) / (sensitivity + specificity - 1),
    clamped to [0, 1]. The 95% interval carries the uncertainty of all three rates: draws from
    their Beta posteriors (Jeffreys prior), each corrected and clamped. A draw in which the judge
    is no better than chance says nothing of the rate and stands for any value in [0, 1].

    The judge must err here as it did on the labelled responses; another kind of model or attack
    needs labels of its own.

    Args:
        effective: How many independent responses the ``n`` are worth, if they are fewer
            (``stats.effective_trials``).

    Raises:
        ValueError: count is not within 0..n.
    """
    observed = wilson(count, n)
    needed = {"response": observed, "attack success": sensitivity, "other response": specificity}
    unknown = partial(CorrectedRate, None, 0.0, 1.0)
    for what, rate in needed.items():
        if not rate.n:
            return unknown(f"no scored {what}")
    youden = sensitivity.value + specificity.value - 1
    if youden <= 0:
        return unknown(
            f"the judge is no better than chance (sensitivity {sensitivity.value:.2f} + "
            f"specificity {specificity.value:.2f} <= 1)"
        )
    value = min(1.0, max(0.0, (observed.value + specificity.value - 1) / youden))
    generator = np.random.default_rng(seed)
    worth = (n if effective is None else effective, sensitivity.n, specificity.n)
    p, se, sp = (
        generator.beta(rate.value * size + 0.5, (1 - rate.value) * size + 0.5, draws)
        for rate, size in zip((observed, sensitivity, specificity), worth, strict=True)
    )
    room = se + sp - 1
    anything = generator.uniform(size=draws)
    drawn = np.where(room > 0, np.clip((p + sp - 1) / np.where(room > 0, room, 1), 0, 1), anything)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return CorrectedRate(value, float(min(low, value)), float(max(high, value)))
