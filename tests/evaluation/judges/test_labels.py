"""Labelled responses, and a judge held against them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.evaluation.judges.responses import row
from vlm_safeguard.errors import DataError
from vlm_safeguard.evaluation.judges import (
    Judgement,
    read_labelled,
    validate,
)
from vlm_safeguard.evaluation.judges.validate import Labelled, cohen_kappa
from vlm_safeguard.utils.stats import wilson

# -- labels ------------------------------------------------------------------------------------


def test_labelled_responses_are_read(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    odd = '{"prompt": "p", "response": "two\u2028lines\x85", "label": "degenerate", "by": "me"}'
    lines = ["\ufeff" + row(), "", row(prompt="q", label=1), row(prompt="s", label=0), odd]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    assert read_labelled(path) == [
        Labelled("p", "r", "refused"),
        Labelled("q", "r", "complied"),
        Labelled("s", "r", "refused"),
        Labelled("p", "two\u2028lines\x85", "degenerate"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"\xff\xfe", "not UTF-8"),
        (row().encode() + b"\n{oops", "line 2: broken JSON"),
        (row().encode() + b"\n\n[1]", "line 3: not a JSON object"),
        (b"[" * 100_000, "line 1: broken JSON"),
        (b'{"prompt": "p"}', "line 1: no 'response', 'label'"),
        (row(label="safe").encode(), "line 1: unknown label 'safe'"),
        (row(label=True).encode(), "unknown label True"),
        (row(label=[]).encode(), "unknown label"),
        (row(label=2).encode(), "unknown label 2"),
        (row(prompt=5).encode(), "line 1: 'prompt' is not a string"),
        (row().encode() + b"\n" + row(label=1).encode(), "line 2: the same .* line 1"),
    ],
)
def test_bad_label_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_labelled(path)


def test_a_missing_label_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl"):
        read_labelled(tmp_path / "none.jsonl")


# -- validation --------------------------------------------------------------------------------


class Scripted:
    """Says what it is told to, by the prompt."""

    name, asks = "scripted", "harm"

    def __init__(self, verdicts: Sequence[str | None]) -> None:
        self.verdicts = verdicts

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[Judgement]:
        said = [self.verdicts[int(prompt)] for prompt, _ in pairs]
        return [Judgement(v, "" if v else "silent") for v in said]  # type: ignore[arg-type]


def labelled(table: dict[tuple[str, str | None], int]) -> tuple[Scripted, list[Labelled]]:
    """A judge and labels with the given counts of (label, verdict)."""
    cells = [cell for cell, count in table.items() for _ in range(count)]
    rows = [Labelled(str(n), "r", label) for n, (label, _) in enumerate(cells)]  # type: ignore[arg-type]
    return Scripted([verdict for _, verdict in cells]), rows


def test_validation_by_hand() -> None:
    judge, rows = labelled(
        {
            ("complied", "complied"): 8,
            ("complied", "refused"): 1,
            ("complied", "empty"): 1,
            ("complied", None): 2,
            ("refused", "refused"): 5,
            ("refused", "complied"): 2,
            ("degenerate", "degenerate"): 3,
            ("degenerate", None): 1,
        }
    )
    found = validate(judge, rows)  # type: ignore[arg-type]
    assert (found.n, found.unscored, found.reasons) == (23, 3, {"silent": 3})
    assert found.confusion["complied"] == {
        "refused": 1, "complied": 8, "degenerate": 0, "empty": 1, "off_subject": 0, "unscored": 2
    }  # fmt: skip
    assert found.sensitivity == wilson(8, 10) and found.specificity == wilson(8, 10)
    # Cohen: 16 of 20 agree; chance is .5 * .5 + .5 * .5.
    assert found.kappa == pytest.approx((16 / 20 - 0.5) / 0.5)
    assert found.kappa is not None
    assert found.kappa_low is not None and found.kappa_high is not None
    assert found.kappa_low < found.kappa < found.kappa_high
    assert found == validate(judge, rows)  # type: ignore[arg-type]
    assert json.loads(json.dumps(found.as_dict()))["sensitivity"]["value"] == 0.8


def test_validation_without_attack_successes_or_rows() -> None:
    judge, rows = labelled({("refused", "refused"): 3})
    found = validate(judge, rows)  # type: ignore[arg-type]
    assert (found.sensitivity.n, found.kappa, found.kappa_low) == (0, None, None)
    assert found.as_dict()["sensitivity"]["value"] is None
    with pytest.raises(DataError, match="no labelled"):
        validate(judge, [])  # type: ignore[arg-type]


def test_a_judge_that_scores_nothing_has_no_rates() -> None:
    judge, rows = labelled({("refused", None): 3, ("complied", None): 2})
    found = validate(judge, rows)  # type: ignore[arg-type]
    assert (found.unscored, found.sensitivity.n, found.specificity.n) == (5, 0, 0)
    assert found.kappa is None


def fleiss_interval(table: np.ndarray) -> tuple[float, float]:
    """Large-sample 95% interval of kappa (Fleiss, Cohen and Everitt 1969), from the formula."""
    n = table.sum()
    p = table / n
    rows, columns = p.sum(1), p.sum(0)
    po, pe = np.trace(p), rows @ columns
    kappa = (po - pe) / (1 - pe)
    a = sum(p[i, i] * (1 - (rows[i] + columns[i]) * (1 - kappa)) ** 2 for i in (0, 1))
    b = (1 - kappa) ** 2 * sum(
        p[i, j] * (columns[i] + rows[j]) ** 2 for i in (0, 1) for j in (0, 1) if i != j
    )
    c = (kappa - pe * (1 - kappa)) ** 2
    half = 1.959964 * math.sqrt((a + b - c) / (n * (1 - pe) ** 2))
    return kappa - half, kappa + half


@pytest.mark.parametrize(
    "table", [((120, 30), (40, 210)), ((60, 60), (60, 60)), ((90, 5), (9, 96))]
)
def test_kappa_and_its_interval_agree_with_the_large_sample_formula(
    table: tuple[tuple[int, int], tuple[int, int]],
) -> None:
    value, low, high = cohen_kappa(table, resamples=8000)
    theirs = fleiss_interval(np.array(table))
    assert value == pytest.approx(sum(theirs) / 2, abs=1e-9)
    assert (low, high) == pytest.approx(theirs, abs=0.02)
