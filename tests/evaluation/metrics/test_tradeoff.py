"""The curve of attack success against over-refusal, on cases that are easy to count."""

from __future__ import annotations

from dataclasses import replace

from tests.evaluation.harness.test_results import judged
from vlm_safeguard.evaluation.benchmarks import load_benchmark
from vlm_safeguard.evaluation.harness.results import Judged, rates
from vlm_safeguard.evaluation.metrics.tradeoff import tradeoff
from vlm_safeguard.evaluation.report import plot_tradeoff
from vlm_safeguard.model.refusals import Verdict
from vlm_safeguard.utils.stats import wilson


def rows(name: str, harmful: bool, score: float, plain: Verdict, guarded: Verdict) -> list[Judged]:
    [one] = judged("none", "c", harmful)
    one = replace(one, id=name, verdict=plain)
    fired = score > 0
    return [one, replace(one, defence="guard", verdict=guarded, fired=fired, score=score)]


CASES = (
    rows("a", True, 2.0, "complied", "refused")
    + rows("b", True, -1.0, "complied", "complied")
    + rows("c", False, 0.5, "complied", "refused")
    + rows("d", False, -3.0, "complied", "complied")
)


def test_a_part_of_the_jailbreak_set_has_as_many_questions_as_it_can() -> None:
    chosen = load_benchmark("own_jailbreak", limit=20)
    for harmful in (True, False):
        part = [p for p in chosen if p.harmful is harmful]
        assert len(part) == len({p.cluster for p in part}) == 20


def test_copies_of_one_question_widen_the_interval() -> None:
    found = rates(judged("s", "c" * 5 + "r" * 45, templates=5))
    assert found["asr"] == 0.1 and found["asr_high"] > wilson(5, 50).high + 0.1


def test_the_guard_as_it_is_and_the_model_without_one_are_on_the_curve() -> None:
    curve = tradeoff(CASES)["text"]
    assert set(tradeoff(CASES)) == {"text"}
    own = next(point for point in curve if point["shift"] == 0)
    assert (own["asr"], own["over_refusal"]) == (0.5, 0.5)
    assert (curve[-1]["asr"], curve[-1]["over_refusal"]) == (1.0, 0.0)


def test_lower_thresholds_stop_more_and_higher_ones_less() -> None:
    by_shift = {point["shift"]: point for point in tradeoff(CASES)["text"]}
    assert by_shift[0.5]["over_refusal"] == 0 and by_shift[0.5]["asr"] == 0.5
    assert by_shift[-3.0]["asr"] == 0 and by_shift[-3.0]["over_refusal"] == 0.5


def test_a_setting_without_both_labels_has_no_curve() -> None:
    assert tradeoff([row for row in CASES if row.harmful]) == {}


def test_every_curve_is_drawn() -> None:
    (axis,) = plot_tradeoff(tradeoff(CASES)).axes
    assert len(axis.lines) == 3  # the curve, the guard, no guard
