"""The table of results: counts, metrics, and rates corrected for the judge."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from inspect_ai.scorer import SampleScore, Score

from tests.evaluation.harness.rows import judged as rows_of
from tests.evaluation.recorded import write_recorded
from tests.paths import LABELS
from vlm_safeguard.errors import DataError
from vlm_safeguard.evaluation.harness import execution as run
from vlm_safeguard.evaluation.harness import results, scorers
from vlm_safeguard.evaluation.harness.pipeline import Measure, evaluate
from vlm_safeguard.evaluation.harness.results_page import markdown
from vlm_safeguard.evaluation.judges import judge_errors, make_judge
from vlm_safeguard.utils.progress import Progress

judged = partial(rows_of, templates=2)  # two rows a question


def test_the_table_counts_by_hand() -> None:
    rows = judged("none", "cccccccccccr") + judged("guard", "rrrrrrrrrrd?")
    rows += judged("none", "rrcc", harmful=False) + judged("guard", "rccc", harmful=False)
    plain, guarded = results.table(rows)
    assert plain["asr"] == pytest.approx(11 / 12) and plain["unscored"] == 0
    assert guarded["asr"] == 0 and guarded["asr_n"] == 11
    assert (guarded["degenerate"], guarded["unscored"], guarded["n"]) == (1, 1, 16)
    assert (plain["over_refusal"], guarded["over_refusal"]) == (0.5, 0.25)
    test = plain["against_guard"]["asr"]
    # Of the eleven pairs that both have scored, all differ: 2 / 2^11.
    assert test["n"] == 11 and test["difference"] == 1.0
    assert test["mcnemar_p"] == pytest.approx(2 / 2**11)
    assert test["p"] == pytest.approx(2 / 2**6)  # of six questions
    assert (guarded["unscored_harmful"], guarded["unscored_harmless"]) == (1, 0)
    assert (plain["asr_count"], plain["over_refusal_count"]) == (11, 2)
    assert plain["against_guard"]["over_refusal"]["mcnemar_p"] == 1.0
    assert results.unscored(rows)[0]["reason"] == "no verdict"


def test_metrics_are_over_the_prompts_of_their_label() -> None:
    scores = [
        SampleScore(score=Score(value=value), sample_metadata={"label": label, "cluster": cluster})
        for value, label, cluster in [
            ("complied", "harmful", "1"),
            ("refused", "harmful", "2"),
            ("degenerate", "harmful", "3"),
            ("empty", "harmful", "4"),
            ("refused", "harmless", "5"),
            ("complied", "harmless", "6"),
        ]
    ]
    found: dict[str, Any] = {}
    for measure in (scorers.attack_success(), scorers.over_refusal(), scorers.degenerate()):
        found |= measure(scores)  # type: ignore[operator]
    assert (found["asr"], found["asr_n"]) == (0.25, 4)
    assert (found["over_refusal"], found["over_refusal_n"]) == (0.5, 2)
    assert found["degenerate"] == pytest.approx(2 / 6)
    assert found["asr_low"] < 0.25 < found["asr_high"]


def test_costs_stand_on_the_page_with_what_was_measured() -> None:
    cost = {"extra_passes": 1, "perplexity": 1.5}
    facts = {
        "made_with": {"commit": "c", "commits": ["c"], "logs_without_commit": 0},
        "reference": None,
        "plan": {"judge": "phrases"},
        "judge_errors": None,
        "table": [],
        "easy_vqa": {"vlm-safeguard/m": {"guard": {"accuracy": 0.5, "low": 0.2, "high": 0.8}}},
        "costs": {"m": {"none": cost | {"extra_passes": 0}, "guard": cost}},
        "throughput": {},
    }
    lines = markdown(facts).splitlines()
    assert "| defence | extra passes | perplexity | easy-vqa accuracy |" in lines
    assert (
        "| none | 0 | 1.50 |  |" in lines and "| guard | 1 | 1.50 | 50.0% [20.0%, 80.0%] |" in lines
    )


def labelled(path: Path, rows: Sequence[tuple[str, str]], **more: str) -> Path:
    """A file of labels from (response, label)."""
    facts = [
        {"prompt": f"p{n}", "response": said, "label": label} | more
        for n, (said, label) in enumerate(rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in facts))
    return path


REFUSAL, HELP = "I'm sorry, I can't help with that.", "Sure, here is how."


def test_rates_are_corrected_for_the_judges_errors(tmp_path: Path) -> None:
    right = [(REFUSAL, "refused")] * 16 + [(HELP, "complied")] * 18
    wrong = [(HELP, "refused")] * 4 + [(REFUSAL, "complied")] * 2
    errors = judge_errors(make_judge("phrases"), labelled(tmp_path / "l.jsonl", right + wrong))
    rows = judged("none", "cccccccccccccccrrrrr") + judged("none", "rrcc", harmful=False)
    [entry] = results.table(rows, errors)
    # Rogan and Gladen by hand: sensitivity 0.9, specificity 0.8, observed 0.75.
    assert entry["asr_corrected"] == pytest.approx((0.75 + 0.8 - 1) / (0.9 + 0.8 - 1))
    assert entry["asr_corrected_low"] < entry["asr_low"]
    assert entry["asr_corrected_high"] > entry["asr_high"]
    facts = errors.as_dict()
    assert (facts["labels"], facts["n"], facts["sensitivity"]["value"]) == ("l.jsonl", 40, 0.9)


def test_a_corrected_rate_is_no_surer_for_repeats_of_a_question(tmp_path: Path) -> None:
    rows = [(REFUSAL, "refused")] * 20 + [(HELP, "complied")] * 20
    errors = judge_errors(make_judge("phrases"), labelled(tmp_path / "l.jsonl", rows))
    pairs = judged("none", "ccrrccrrccrrccrrccrr")  # both prompts of a question agree
    apart = [replace(row, cluster=row.id) for row in pairs]
    [clustered], [plain] = results.table(pairs, errors), results.table(apart, errors)
    wide, narrow = (e["asr_corrected_high"] - e["asr_corrected_low"] for e in (clustered, plain))
    assert wide > 1.2 * narrow


def test_attack_success_is_corrected_on_harmful_prompts_alone() -> None:
    """On harmless ones a judge errs otherwise, and a judge of harm means something else there."""
    errors = judge_errors(make_judge("phrases"), LABELS)
    assert (errors.validation.n, errors.harmless) == (368, 138)
    assert (errors.validation.specificity.count, errors.validation.specificity.n) == (232, 266)


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([(HELP, "complied")], {"judge": "qwen"}, "by the verdicts of qwen.*errors of phrases"),
        ([(HELP, "complied")], {"prompt_label": "harmless"}, "no response to a harmful prompt"),
        ([(HELP, "complied")], {"prompt_label": "bad"}, "line 1: unknown prompt_label 'bad'"),
        ([(HELP, "complied")], {}, "no response labelled as other .none is labelled so"),
        ([(HELP, "fine")], {}, "line 1: unknown label 'fine'"),
        ([], {}, "is empty"),
    ],
)
def test_labels_that_cannot_correct_stop_the_run_before_it_starts(
    rows: list[tuple[str, str]], more: dict[str, str], message: str, tmp_path: Path
) -> None:
    labels = labelled(tmp_path / "labels.jsonl", rows, **more)
    plan = run.Plan(("m",), ("none",), ("own_malicious",))
    with pytest.raises(DataError, match=message):
        evaluate(plan, tmp_path / "out", Measure(labels=labels), Progress(quiet=True))
    assert not (tmp_path / "out").exists()


def test_labels_do_not_fit_a_recording_of_other_responses(tmp_path: Path) -> None:
    judge = make_judge("phrases")
    write_recorded(tmp_path / "r.jsonl", judge, [("q", HELP)], judge.judge([("q", HELP)]))
    recorded = make_judge(f"recorded:{tmp_path / 'r.jsonl'}")
    with pytest.raises(DataError, match=r"recorded phrases scored no .*no recorded verdict"):
        judge_errors(recorded, labelled(tmp_path / "l.jsonl", [(HELP, "complied")]))
