"""A judge held against labels: responses to harmful and to harmless prompts apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.command import run
from tests.paths import DOCS
from vlm_safeguard.errors import DataError
from vlm_safeguard.evaluation.judges import (
    Judgement,
    make_judge,
    read_labelled,
    validate,
    validation_page,
)
from vlm_safeguard.evaluation.judges.validate import Labelled
from vlm_safeguard.utils.stats import wilson

SAID = {"yes": "complied", "no": "refused", "loop": "degenerate"}


class Says:
    """Gives the verdict that the response names; of harm, if told so."""

    name = "says"

    def __init__(self, asks: str = "refusal") -> None:
        self.asks = asks

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[Judgement]:
        return [Judgement(SAID[response]) for _, response in pairs]  # type: ignore[arg-type]


def rows() -> list[Labelled]:
    """Harmful: 3 of 4 successes found, 5 of 6 others; harmless: 2 of 3 refusals, 7 of 8 others."""
    table = [("yes", "complied", True, 3), ("no", "complied", True, 1), ("no", "refused", True, 4)]
    table += [("loop", "degenerate", True, 1), ("yes", "refused", True, 1)]
    table += [("no", "refused", False, 2), ("yes", "refused", False, 1)]
    table += [("yes", "complied", False, 6), ("loop", "degenerate", False, 1)]
    table += [("no", "complied", False, 1)]
    return [
        Labelled(f"p{n}-{k}", said, label, harmful)  # type: ignore[arg-type]
        for n, (said, label, harmful, count) in enumerate(table)
        for k in range(count)
    ]


def test_prompts_of_the_two_kinds_are_never_pooled() -> None:
    judge = Says()
    success = validate(judge, rows())  # type: ignore[arg-type]
    assert (success.prompts, success.n) == ("harmful", 10)
    assert (success.sensitivity, success.specificity) == (wilson(3, 4), wilson(5, 6))
    refusals = validate(judge, rows(), "harmless")  # type: ignore[arg-type]
    assert (refusals.prompts, refusals.n) == ("harmless", 11)
    assert (refusals.sensitivity, refusals.specificity) == (wilson(2, 3), wilson(7, 8))
    # Cohen: 9 of 11 agree; 3 are labelled and 3 called refusals.
    chance = (3 * 3 + 8 * 8) / 11**2
    assert refusals.kappa == pytest.approx((9 / 11 - chance) / (1 - chance))
    page = validation_page(success, refusals, 11)
    assert page.index("attack success on harmful prompts: 10 ") < page.index("refusals of harmless")


def test_a_perfect_judge_of_harm_is_perfect() -> None:
    """It calls compliance with a harmless prompt harmless, which is no miss."""
    judge = Says("harm")
    labelled = [Labelled(f"p{n}", "yes", "complied") for n in range(5)]
    labelled += [Labelled(f"q{n}", "no", "refused") for n in range(5)]
    labelled += [Labelled(f"r{n}", "no", "complied", harmful=False) for n in range(30)]
    found = validate(judge, labelled)  # type: ignore[arg-type]
    assert (found.sensitivity, found.specificity, found.kappa) == (wilson(5, 5), wilson(5, 5), 1.0)
    with pytest.raises(DataError, match="says judges harm, not refusals"):
        validate(judge, labelled, "harmless")  # type: ignore[arg-type]
    assert "30 responses to harmless prompts left out" in validation_page(found, None, 30)


def test_labels_of_one_kind_only() -> None:
    judge, harmful = Says(), [row for row in rows() if row.harmful]
    with pytest.raises(DataError, match="no labelled responses to harmless prompts"):
        validate(judge, harmful, "harmless")  # type: ignore[arg-type]
    page = validation_page(validate(judge, harmful), None, 0)  # type: ignore[arg-type]
    assert "harmless" not in page


def test_the_documented_figures_are_those_of_the_labels() -> None:
    """docs/evaluate.md holds the command's own output: paste it again when the labels change."""
    judge, labelled = make_judge("phrases"), read_labelled(DOCS / "assets" / "judge-labels.jsonl")
    parts = validate(judge, labelled), validate(judge, labelled, "harmless")
    harmless = sum(not row.harmful for row in labelled)
    assert validation_page(*parts, harmless) in (DOCS / "evaluate.md").read_text("utf-8")


def test_the_command_prints_both_parts(tmp_path: Path) -> None:
    lines = [
        {"prompt": "a", "response": "I'm sorry, I can't help with that.", "label": "refused"},
        {"prompt": "b", "response": "Sure, here is how.", "label": "complied"},
        {"prompt": "c", "response": "Paris.", "label": "complied", "prompt_label": "harmless"},
    ]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = run("validate-judge", "l.jsonl", cwd=tmp_path)
    assert done.returncode == 0 and "refusals of harmless prompts: 1 labelled" in done.stdout
    facts = json.loads(run("validate-judge", "l.jsonl", "--json", cwd=tmp_path).stdout)
    assert (facts["n"], facts["harmless"], facts["sensitivity"]["count"]) == (2, 1, 1)
    assert facts["refusals"]["sensitivity"]["value"] is None


def test_labels_chosen_by_another_judge_validate_none(tmp_path: Path) -> None:
    row = {"prompt": "How?", "response": "No.", "label": "refused", "judge": "somebody"}
    (tmp_path / "labels.jsonl").write_text(json.dumps(row) + "\n")
    done = run("validate-judge", "labels.jsonl", cwd=tmp_path)
    assert done.returncode == 1 and "by the verdicts of somebody" in " ".join(done.stderr.split())
