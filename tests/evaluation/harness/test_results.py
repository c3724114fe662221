"""What stands on the page of results: counts, tests against the reference, and the commits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tests.evaluation.harness.rows import judged
from vlm_safeguard.evaluation.harness import outputs, results
from vlm_safeguard.evaluation.harness.results_page import markdown
from vlm_safeguard.utils import checkout
from vlm_safeguard.utils.stats import Rate, wilson


def test_a_judge_of_harm_knows_no_over_refusal() -> None:
    """Garbled answers to harmless prompts count as such, and make no rate of nought."""
    rows = judged("none", "cr") + [replace(r, asked=False) for r in judged("none", "d?", False)]
    found = results.rates(rows)
    assert found["over_refusal"] is None and found["over_refusal_n"] == 0
    assert (found["degenerate"], found["asr_n"]) == (1, 2)


def test_answers_off_the_subject_to_harmful_requests_are_counted_apart() -> None:
    rows = judged("none", "crood?", templates=1) + judged("none", "oco", harmful=False)
    found = results.rates(rows)
    assert (found["asr_count"], found["refused_count"], found["asr_n"]) == (1, 1, 5)
    assert Rate.from_dict(found, "off_subject_harmful") == wilson(2, 5)
    assert (found["off_subject"], found["degenerate"]) == (4, 1)


def test_of_what_is_refused_as_text_the_share_that_stays_refused_is_counted() -> None:
    beside = [
        replace(row, setting="blank")
        for row in judged("none", "crcr?", templates=1) + judged("guard", "rrcrr", templates=1)
    ]
    rows = judged("none", "rrrcr", templates=1) + judged("guard", "rrrrr", templates=1) + beside
    rows += judged("none", "rr", harmful=False)
    found = {(e["setting"], e["defence"]): e for e in results.table(rows)}
    shares = {key: (e["kept_count"], e["kept_n"]) for key, e in found.items()}
    assert shares == {
        ("text", "none"): (4, 4),
        ("text", "guard"): (4, 4),
        ("blank", "none"): (1, 3),  # one of the four could not be scored
        ("blank", "guard"): (3, 4),
    }
    assert results.by_setting(rows)["blank"]["guard"]["kept"] == 0.75
    [[_, kept, *_]] = cells(page(rows), "guard")
    assert kept.startswith("100.0% [") and kept.endswith("] 4/4")


def page(rows: Sequence[results.Judged], made: dict[str, Any] | None = None) -> str:
    made = made or {"commit": "abc", "commits": ["abc"], "logs_without_commit": 0}
    return markdown(
        {
            "made_with": made,
            "plan": {"judge": "phrases"},
            "judge_errors": None,
            "reference": results.reference(rows),
            "table": results.table(rows),
            "easy_vqa": {},
            "costs": {},
            "throughput": {},
        }
    )


def cells(page: str, defence: str) -> list[list[str]]:
    """The cells after the defence's name in each row of it."""
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if "|" in line]
    return [line[3:] for line in lines if line[:3] == ["b", "text", defence]]


def test_two_questions_that_flip_in_all_templates_are_no_evidence() -> None:
    rows = judged("none", "c" * 10 + "r" * 40) + judged("guard", "r" * 50)
    [plain] = [e for e in results.table(rows) if e["defence"] == "none"]
    test = plain["against_guard"]["asr"]
    assert test["mcnemar_p"] < 0.01 and test["p"] == 0.5
    assert "*" not in cells(page(rows), "none")[0][0]
    rows = judged("none", "c" * 30 + "r" * 20) + judged("guard", "r" * 50)  # six: p = 2 / 2^6
    assert cells(page(rows), "none")[0][0].endswith("30/50 *")


def test_rates_stand_with_their_counts_and_the_unscored_of_each_label() -> None:
    rows = judged("guard", "crrrrrro??", templates=1) + judged("guard", "cor?", harmful=False)
    [[asr, kept, over_refusal, off_subject, degenerate, unscored]] = cells(page(rows), "guard")
    assert asr.startswith("12.5% [") and asr.endswith("] 1/8") and not kept
    assert over_refusal.startswith("33.3% [") and over_refusal.endswith("] 1/3")
    assert (off_subject, degenerate, unscored) == ("1", "0", "2 harmful, 1 harmless")
    assert "Differences" not in page(rows)  # from what?


def test_differences_stand_where_there_are_any() -> None:
    rows = judged("guard", "rrrrrrrrrr", templates=1) + judged("guard", "cccc", harmful=False)
    rows += judged("none", "rrrrrrrrrr", templates=1) + judged("none", "cccc", harmful=False)
    rows += judged("other", "cccrrrrrrr", templates=1) + judged("other", "cccc", harmful=False)
    found = page(rows)
    assert len(cells(found, "none")) == len(cells(found, "guard")) == 1
    asr, over_refusal = cells(found, "other")[1]
    test = next(e for e in results.table(rows) if e["defence"] == "other")["against_guard"]["asr"]
    interval = f"[{test['low']:+.1%}, {test['high']:+.1%}]"
    assert asr == f"+30.0% {interval}, p = 0.25 (10)" and over_refusal == "0 (4)"
    assert "no question differs: 1." in found


def test_without_the_guard_no_defence_is_the_reference() -> None:
    rows = judged("other", "r" * 10, templates=1) + judged("none", "c" * 10, templates=1)
    other, plain = results.table(rows)
    assert other["against_none"]["asr"]["difference"] == -1
    assert not any(key.startswith("against") for key in plain)
    found = page(rows)
    assert "## Differences from no defence" in found and "than with no defence" in found
    first, second = cells(found, "other")
    assert first[0].endswith("0/10 -") and second[0].startswith("-100.0% [-100.0%, -100.0%]")
    assert results.reference(judged("guard", "r")) is None


def log(commit: str | None, dirty: bool = False) -> Any:
    revision = SimpleNamespace(commit=commit, dirty=dirty) if commit else None
    return SimpleNamespace(eval=SimpleNamespace(revision=revision))


@pytest.fixture
def known_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Knows the commits aaa and bbb, and is at now."""

    def git(*words: str) -> str | None:
        known = words[-1].removesuffix("^{commit}")
        return known * 2 if known in ("aaa", "bbb") else None

    monkeypatch.setattr(outputs, "git", git)
    monkeypatch.setattr(outputs, "commit", lambda: "now")


@pytest.mark.usefixtures("known_commits")
@pytest.mark.parametrize(
    ("logs", "commit", "named", "without", "says"),
    [
        ([log("aaa")] * 2, "aaaaaa", ["aaaaaa"], 0, "Commit `aaaaaa` (as the logs record it)."),
        (
            [log("aaa"), log("bbb", dirty=True), log("aaa")],
            None,
            ["aaaaaa", "bbbbbb+"],
            0,
            "Made at 2 commits: `aaaaaa`, `bbbbbb+` (as the logs record it; `+`: with changes",
        ),
        ([log("aaa"), log(None)], None, ["aaaaaa"], 1, "1 of them record none of this project"),
        # Another project's repository, in which the command was run.
        ([log("elsewhere")], "now", [], 1, "Commit `now`, when the results were written"),
        ([log(None)], "now", [], 1, "(the logs record none of this project)."),
    ],
)
def test_the_commits_are_those_that_the_logs_record(
    logs: list[Any], commit: str | None, named: list[str], without: int, says: str
) -> None:
    made = outputs.commits(logs)
    assert made == {"commit": commit, "commits": named, "logs_without_commit": without}
    assert says in page(judged("none", "c"), made).splitlines()[0]


def test_the_checkout_knows_its_own_commit() -> None:
    here = checkout.commit()
    if here is None:
        pytest.skip("not in a git checkout")
    head = here.removesuffix("+")
    assert outputs.commits([log(head[:7], dirty=True)])["commits"] == [head + "+"]
    assert outputs.commits([log("0" * 40)])["commits"] == []


def test_where_a_rival_is_better_the_page_says_so_and_what_failed() -> None:
    rows = [replace(r, fired=n == 0) for n, r in enumerate(judged("guard", "ccrr"))]
    rows += judged("self-reminder", "crrr") + judged("none", "cccr")
    rows += judged("paper-formula", "dddd")  # nothing succeeds, nothing is answered
    text = page(rows)
    assert "| b | text | ASR | self-reminder | 2/4 | 1 | 1 |" in text
    assert "paper-formula" not in text.split("## Where the guard")[1]


def test_a_guard_that_nothing_beats_is_said_to_be_the_best() -> None:
    text = page(judged("guard", "rrrr") + judged("none", "crrr"))
    assert "In no cell." in text.split("## Where the guard")[1]
