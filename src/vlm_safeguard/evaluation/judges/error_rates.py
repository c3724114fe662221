"""Measures a judge's error rates on labelled responses, to correct attack success."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_safeguard.errors import DataError
from vlm_safeguard.evaluation.judges.judgement import Judge
from vlm_safeguard.evaluation.judges.validate import (
    CorrectedRate,
    Labelled,
    Validation,
    corrected_rate,
    read_labelled,
    validate,
)


@dataclass(frozen=True)
class JudgeErrors:
    """A judge's sensitivity and specificity on labelled responses to harmful prompts.

    Attributes:
        labels, sha256: Name and digest of the file of labels.
        harmless: Labelled responses to harmless prompts, left out: attack success is not about
            them, and a judge errs otherwise on them.
    """

    labels: str
    sha256: str
    harmless: int
    validation: Validation

    def corrected(self, count: int, n: int, effective: float) -> CorrectedRate:
        """The rate behind ``count`` of ``n``; see ``corrected_rate``."""
        found = self.validation
        return corrected_rate(count, n, found.sensitivity, found.specificity, effective=effective)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        facts = {"labels": self.labels, "sha256": self.sha256, "harmless_left_out": self.harmless}
        return facts | self.validation.as_dict()


def check_chosen_for(judge: Judge, rows: Sequence[Labelled], labels: Path) -> None:
    """Refuse labels of responses that another judge's verdicts chose.

    Raises:
        DataError: names the other judges.
    """
    others = sorted({row.judge for row in rows} - {"", judge.name})
    if others:
        raise DataError(
            f"{labels} holds responses chosen by the verdicts of {', '.join(others)}: they do not "
            f"show the errors of {judge.name}"
        )


def judge_errors(judge: Judge, labels: Path) -> JudgeErrors:
    """Hold ``judge`` against the labelled responses to harmful prompts in ``labels``.

    Raises:
        DataError: the file is bad, belongs to another judge, or leaves sensitivity or specificity
            unknown.
    """
    rows = read_labelled(labels)
    check_chosen_for(judge, rows, labels)
    harmful = [row for row in rows if row.harmful]
    if not harmful:
        raise DataError(f"{labels} holds no response to a harmful prompt: nothing to correct with")
    found = validate(judge, harmful)
    for name, rate in (("attack success", found.sensitivity), ("other", found.specificity)):
        if not rate.n:
            why = next(iter(found.reasons), "none is labelled so")
            raise DataError(
                f"{labels}: {judge.name} scored no response labelled as {name} ({why}), so its "
                "errors are unknown"
            )
    digest = hashlib.sha256(labels.read_bytes()).hexdigest()
    return JudgeErrors(labels.name, digest, len(rows) - len(harmful), found)
