"""Two runs of an evaluation compared: prompt by prompt where responses are there, else by rates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.command import run
from tests.paths import DOCS
from vlm_safeguard.errors import DataError
from vlm_safeguard.evaluation.harness.rerun import compare_runs, flipped, read_run, rerun_page
from vlm_safeguard.utils.stats import difference_interval, wilson

WORDS = {"c": "complied", "r": "refused", "d": "degenerate", "?": None}


def entry(harmful: str, harmless: str, **place: str) -> dict[str, Any]:
    """A row of the table from letters: c complied, r refused, d degenerate, ? unscored."""
    found: dict[str, Any] = {"model": "m", "benchmark": "b", "setting": "text", "defence": "none"}
    found |= place
    for name, verdicts, hit in (("asr", harmful, "c"), ("over_refusal", harmless, "r")):
        scored = verdicts.replace("?", "")
        rate = wilson(scored.count(hit), len(scored))
        found |= {name: rate.value if rate.n else None, f"{name}_n": rate.n}
        found |= {f"{name}_low": rate.low, f"{name}_high": rate.high}
    both = harmful + harmless
    counts = {"n": len(both), "unscored": both.count("?"), "degenerate": both.count("d")}
    return found | counts | {"empty": 0, "off_subject": 0}


def write(folder: Path, harmful: str, harmless: str = "cccc", responses: bool = True) -> Path:
    """A run of one cell; its ``results.json``."""
    folder.mkdir()
    facts = {
        "plan": {"judge": "phrases", "limit": None, "max_tokens": 32},
        "table": [entry(harmful, harmless)],
        "easy_vqa": {"m": {"none": {"accuracy": 0.9, "low": 0.8, "high": 0.95, "n": 50}}},
    }
    (folder / "results.json").write_text(json.dumps(facts))
    place = {"model": "m", "benchmark": "b", "setting": "text", "defence": "none"}
    if responses:
        lines = [
            place | {"id": f"{label}-{n}", "label": label, "verdict": WORDS[letter]}
            for label, verdicts in (("harmful", harmful), ("harmless", harmless))
            for n, letter in enumerate(verdicts)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "responses.jsonl").write_text(text)
    return folder / "results.json"


def differing(first: Path, second: Path) -> dict[str, str]:
    found = compare_runs(read_run(first), read_run(second))
    return {one.rate: one.differs for one in found if one.differs}


@pytest.mark.parametrize(
    "other", [{"attack": "template:a.txt"}, {"defence_texts": [["self-reminder", "b.txt"]]}]
)
def test_another_attack_or_wording_is_another_plan(tmp_path: Path, other: dict[str, Any]) -> None:
    first, second = write(tmp_path / "one", "cr"), write(tmp_path / "two", "cr")
    facts = json.loads(second.read_text())
    facts["plan"] |= other
    second.write_text(json.dumps(facts))
    with pytest.raises(DataError, match="not two runs of one plan"):
        compare_runs(read_run(first), read_run(second))


def test_an_accuracy_of_other_questions_differs(tmp_path: Path) -> None:
    first, second = write(tmp_path / "one", "cr"), write(tmp_path / "two", "cr")
    facts = json.loads(second.read_text())
    facts["easy_vqa"]["m"]["none"]["n"] = 40
    second.write_text(json.dumps(facts))
    assert differing(first, second) == {"accuracy": "50 questions in one run, 40 in the other"}


def test_the_same_run_again_is_the_same(tmp_path: Path) -> None:
    runs = [read_run(write(tmp_path / name, "ccrrrd?", "crr")) for name in "ab"]
    found = compare_runs(*runs)
    assert [one.rate for one in found] == [
        "asr",
        "over_refusal",
        "off_subject",
        "degenerate",
        "unscored",
        "accuracy",
    ]
    assert (found[0].first, found[0].second, found[0].flips) == (2 / 6, 2 / 6, 0)
    assert not any(one.differs for one in found)
    assert flipped(*runs) == 0
    page = "0 of 6 rates in 2 cells differ by more than their intervals allow (verdicts: 0 flipped)"
    assert page in rerun_page(found, 0)


def test_flips_are_counted_and_tested_in_pairs(tmp_path: Path) -> None:
    first = write(tmp_path / "a", "c" * 10 + "r" * 10)
    few = write(tmp_path / "b", "c" * 5 + "r" * 15)  # 5 flips one way: p = 2 / 2^5 = 0.0625
    more = write(tmp_path / "c", "c" * 4 + "r" * 16)  # 6: p = 0.03125
    there_and_back = write(tmp_path / "d", "r" * 5 + "c" * 10 + "r" * 5)
    assert differing(first, few) == {}
    assert differing(first, more) == {"asr": "6 of 20 verdicts flipped (p = 0.031)"}
    assert differing(first, there_and_back) == {}
    assert flipped(read_run(first), read_run(there_and_back)) == 10


def test_a_question_that_flips_in_all_templates_counts_once(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", "c" * 20), write(tmp_path / "b", "c" * 10 + "r" * 10)
    assert list(differing(first, second)) == ["asr"]
    # Ten flips in two questions: it is enough that one of the runs names them.
    path = first.with_name("responses.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for n, row in enumerate(rows):
        row["cluster"] = f"question {n // 5}"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert differing(first, second) == differing(second, first) == {}


def test_what_one_run_could_not_score_is_a_rate_of_its_own(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", "c" * 20), write(tmp_path / "b", "c" * 10 + "?" * 10)
    assert list(differing(first, second)) == ["unscored"]


def test_without_responses_the_intervals_decide(tmp_path: Path) -> None:
    first = write(tmp_path / "a", "c" * 10 + "r" * 40, responses=False)
    near = write(tmp_path / "b", "c" * 15 + "r" * 35)
    far = write(tmp_path / "c", "c" * 25 + "r" * 25)
    assert differing(first, near) == {}
    assert set(differing(first, far)) == {"asr"} and "difference +" in differing(first, far)["asr"]
    assert flipped(read_run(first), read_run(near)) is None


def test_the_interval_of_a_difference_is_newcombes() -> None:
    """Two of his own examples (1998, table II, method 10): 56/70 - 48/80 and 9/10 - 3/10."""
    for (a, m), (b, n), expected in (
        ((56, 70), (48, 80), (0.0524, 0.3339)),
        ((9, 10), (3, 10), (0.1705, 0.8090)),
    ):
        rates = wilson(b, n), wilson(a, m)
        low, high = difference_interval(*rates)
        assert (low, high) == pytest.approx(expected, abs=5e-5)


def change(path: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    facts = json.loads(path.read_text())
    edit(facts)
    path.write_text(json.dumps(facts))
    return path


def test_a_cell_that_is_missing_or_smaller_always_differs(tmp_path: Path) -> None:
    first = write(tmp_path / "a", "ccrr")
    assert differing(first, write(tmp_path / "b", "ccr")) == {
        "cell": "8 prompts in one run, 7 in the other"
    }
    none = change(write(tmp_path / "c", "ccrr"), lambda facts: facts["table"].clear())
    assert differing(first, none) == {"cell": f"not in {none}"}
    assert differing(none, first) == {"cell": f"not in {none}"}
    blind = change(write(tmp_path / "d", "ccrr"), lambda facts: facts["easy_vqa"].clear())
    assert differing(first, blind) == {"accuracy": "only one run has it"}
    other = write(tmp_path / "e", "ccrr")
    responses = other.with_name("responses.jsonl")
    responses.write_text(responses.read_text().replace("harmful-0", "harmful-9"))
    assert differing(first, other) == {"cell": "the responses are not to the same prompts"}


def test_what_is_no_second_run_is_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "a", "ccrr")
    second = change(write(tmp_path / "b", "ccrr"), lambda facts: facts["plan"].update(limit=9))
    with pytest.raises(DataError, match=r"not two runs of one plan: limit is None in .* and 9 in"):
        differing(first, second)
    odd = change(write(tmp_path / "c", "ccrr"), lambda facts: facts["table"][0].pop("asr_low"))
    with pytest.raises(DataError, match=r"not a results.json of vlm-safeguard evaluate .*asr_low"):
        read_run(odd)
    (tmp_path / "d").mkdir()
    with pytest.raises(DataError, match="cannot read the results"):
        read_run(tmp_path / "d")
    responses = first.with_name("responses.jsonl")
    responses.write_text(responses.read_text() * 2)
    with pytest.raises(DataError, match="line 9: a second response to harmful-0"):
        read_run(first)


def test_the_committed_comparison_can_be_checked() -> None:
    path = DOCS / "assets" / "comparison.json"
    found = compare_runs(read_run(path), read_run(path))
    assert len(found) > 100 and not any(one.differs for one in found)


def test_the_command_fails_where_a_cell_differs(tmp_path: Path) -> None:
    write(tmp_path / "a", "c" * 20), write(tmp_path / "b", "r" * 20)
    done = run("check-results", "a", "a/results.json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("0 of 6")
    done = run("check-results", "a", "b", cwd=tmp_path)
    assert done.returncode == 1 and "m b text none: asr 100.0% -> 0.0%, 20 of 20" in done.stdout
    done = run("check-results", "a", "b", "--json", cwd=tmp_path)
    facts = json.loads(done.stdout)
    assert done.returncode == 1 and (facts["same"], facts["flipped"]) == (False, 20)
