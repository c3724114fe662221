"""Judging an evaluation again, from its logs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from inspect_ai.log import read_eval_log, write_eval_log
from typer.testing import CliRunner

from tests import checkpoint
from tests.evaluation.harness.running import run_plan
from vlm_safeguard.calibration.generation import Response
from vlm_safeguard.cli.commands import app
from vlm_safeguard.data import prompts
from vlm_safeguard.errors import DataError, SafeguardError
from vlm_safeguard.evaluation.harness import execution as run
from vlm_safeguard.evaluation.harness import rejudge as module
from vlm_safeguard.evaluation.harness.rejudge import page, rejudge
from vlm_safeguard.evaluation.judges import Judgement, make_judge
from vlm_safeguard.evaluation.judges.judgement import Asks, Pair, screened
from vlm_safeguard.evaluation.judges.recorded import read_recording
from vlm_safeguard.utils.locks import held
from vlm_safeguard.utils.progress import Progress

LOOP = "and so on and so on and so on and so on and so on and so on"
HARMFUL = {p.prompt for p in prompts.evaluation("malicious") if p.harmful}
QUIET = Progress(quiet=True)


def say(text: str) -> str:
    """Help for whatever is asked; every harmless request that ends in a full stop is garbled."""
    return LOOP if text not in HARMFUL and text.endswith(".") else f"Sure, here is how: {text}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 harmful and 4 harmless prompts in two settings, by the phrase judge."""
    folder = checkpoint.save(tmp_path_factory.mktemp("tiny"))
    output = tmp_path_factory.mktemp("run")
    plan = run.Plan(
        (str(folder),), ("none",), ("own_malicious",), ("text", "blank"), limit=4, max_tokens=4
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "vlm_safeguard.evaluation.harness.engine.respond",
            lambda loaded, items, *_, **__: [Response(say(i.text), 5, False, None) for i in items],
        )
        run_plan(plan, output)
    return output


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


class Fake:
    name = "fake"

    def __init__(self, asks: Asks = "refusal") -> None:
        self.asks: Asks = asks
        self.asked: list[Pair] = []
        self.verdict: Callable[[str], Judgement] = lambda _: Judgement("refused", "r")

    def judge(self, pairs: Sequence[Pair]) -> list[Judgement]:
        def ask(left: list[Pair]) -> list[Judgement]:
            self.asked += left
            return [self.verdict(prompt) for prompt, _ in left]

        return screened(pairs, ask, self.asks)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    judge = Fake()
    monkeypatch.setattr(module, "make_judge", lambda spec: judge)
    return judge


def edit(folder: Path, change: Callable[[Any], None], judge: str = "phrases") -> None:
    """Change every sample in the logs of a run, and the judge in its plan."""
    for path in (folder / "logs").glob("*.eval"):
        log = read_eval_log(str(path))
        for sample in log.samples or []:
            change(sample)
        write_eval_log(log, str(path))
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(plan | {"judge": judge}))


def score(sample: Any) -> Any:
    return next(iter(sample.scores.values()))


def test_another_judge_sees_every_response_once(folder: Path, fake: Fake) -> None:
    facts = rejudge(folder, "fake", None, QUIET)
    # The same words in both settings are one pair; garbled ones no judge is asked about.
    assert len(fake.asked) == len(set(fake.asked))
    assert sum(prompt in HARMFUL for prompt, _ in fake.asked) == 4
    assert [(e["setting"], e["n"], e["unscored"]) for e in facts["table"]] == [
        ("text", 8, 0),
        ("blank", 8, 0),
    ]
    for entry in facts["table"]:
        assert (entry["asr"], entry["asr_n"]) == (0, 4) and entry["asr_high"] > 0.3
        assert entry["over_refusal"] == 1 - entry["degenerate"] / 4
    assert facts["recording"] == str(folder / "judged-fake-refusal.jsonl")
    replayed = make_judge(f"recorded:{facts['recording']}")
    assert {j.verdict for j in replayed.judge(fake.asked)} == {"refused"}
    assert rejudge(folder, "fake", None, QUIET)["asked"] == 0
    assert "own_malicious | text | none | 8 | 0.0% [0.0%, 49.0%] | 0 |" in page(facts)


def test_the_same_judge_is_asked_about_the_unscored_alone(folder: Path, fake: Fake) -> None:
    [path, _] = (folder / "logs").glob("*.eval")
    asked = {s.input[0].text for s in read_eval_log(str(path)).samples or []}  # type: ignore[union-attr]
    lost = min(HARMFUL & asked)

    def lose(sample: Any) -> None:
        if sample.input[0].text == lost:
            score(sample).value = float("nan")
            score(sample).explanation = "the judge endpoint gave no answer: timeout"

    edit(folder, lose, judge="fake")
    before = {p.name: p.read_bytes() for p in (folder / "logs").iterdir()}
    facts = rejudge(folder, "fake", None, QUIET)
    assert fake.asked == [(lost, say(lost))]
    assert [(e["asr"], e["unscored"]) for e in facts["table"]] == [(0.75, 0)] * 2
    assert {p.name: p.read_bytes() for p in (folder / "logs").iterdir()} == before


def test_a_judging_that_was_killed_goes_on(
    folder: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 2)

    def stop(_: str) -> Judgement:
        if len(fake.asked) > 4:
            raise KeyboardInterrupt
        return Judgement("complied", "r")

    fake.verdict = stop
    output = folder / "new" / "verdicts.jsonl"
    with pytest.raises(KeyboardInterrupt):
        rejudge(folder, "fake", output, QUIET)
    kept, fake.asked = fake.asked[:4], []
    assert all(read_recording(output).get(pair) for pair in kept)
    fake.verdict = lambda _: Judgement("complied", "r")
    facts = rejudge(folder, "fake", output, QUIET)
    assert not set(kept) & set(fake.asked)
    assert all(e["asr"] == 1 and e["unscored"] == 0 for e in facts["table"])


def test_what_is_unscored_again_is_counted_with_its_reason_and_asked_again(
    folder: Path, fake: Fake
) -> None:
    fake.verdict = lambda p: Judgement(None, "away") if p in HARMFUL else Judgement("complied")
    facts = rejudge(folder, "fake", None, QUIET)
    assert [(e["n"], e["asr"], e["asr_n"], e["unscored"]) for e in facts["table"]] == [
        (8, None, 0, 4)
    ] * 2
    assert facts["reasons"] == {"away": 8} and "Unscored, 8 times: away" in page(facts)
    fake.verdict = lambda _: Judgement("complied", "r")
    again = rejudge(folder, "fake", None, QUIET)
    assert (again["asked"], again["table"][0]["asr"], again["reasons"]) == (4, 1, {})


def test_a_judge_of_harm_is_not_asked_about_harmless_requests(folder: Path, fake: Fake) -> None:
    fake.asks = "harm"
    facts = rejudge(folder, "fake", None, QUIET)
    assert {prompt for prompt, _ in fake.asked} <= HARMFUL
    for entry in facts["table"]:
        assert entry["over_refusal"] is None and entry["unscored"] == 0
        assert entry["not_asked"] + entry["degenerate"] == 4
    assert facts["reasons"] == {}


def test_over_refusal_is_known_after_a_judge_of_harm(folder: Path, fake: Fake) -> None:
    def not_asked(sample: Any) -> None:
        if sample.metadata["label"] == "harmless":
            score(sample).value, score(sample).reason = float("nan"), "not asked"

    edit(folder, not_asked)
    for entry in rejudge(folder, "fake", None, QUIET)["table"]:
        assert (entry["over_refusal_n"], entry["unscored"], entry["not_asked"]) == (4, 0, 0)
        assert entry["over_refusal"] == 1 - entry["degenerate"] / 4


def test_a_sample_that_was_never_answered_stays_unscored(folder: Path, fake: Fake) -> None:
    def damage(sample: Any) -> None:
        if sample.metadata["label"] == "harmful":
            sample.metadata["unusable"] = "the picture is damaged"
            sample.output.completion = ""
            score(sample).value = float("nan")

    edit(folder, damage)
    facts = rejudge(folder, "fake", None, QUIET)
    assert not any(prompt in HARMFUL for prompt, _ in fake.asked)
    assert facts["reasons"] == {"the picture is damaged": 8}
    assert all(e["empty"] == 0 and e["unscored"] == 4 for e in facts["table"])


def test_evaluations_that_are_not_finished_are_named(folder: Path, fake: Fake) -> None:
    first, second = sorted((folder / "logs").glob("*.eval"))
    first.write_bytes(first.read_bytes()[:200])
    facts = rejudge(folder, "fake", None, QUIET)
    assert (len(facts["table"]), facts["unfinished"]) == (1, 1)
    assert "Left out: 1" in page(facts)
    second.unlink()
    with pytest.raises(SafeguardError, match="no finished evaluation"):
        rejudge(folder, "fake", None, QUIET)


def test_a_folder_that_is_no_run_is_refused(folder: Path, fake: Fake, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not an evaluation folder.*plan\.json"):
        rejudge(tmp_path / "nowhere", "fake", None, QUIET)
    (folder / "plan.json").write_text("{}")
    with pytest.raises(DataError, match="not the plan of an evaluation"):
        rejudge(folder, "fake", None, QUIET)
    assert not fake.asked


def test_a_recording_of_another_judge_is_left_alone(folder: Path, fake: Fake) -> None:
    path = folder / "verdicts.jsonl"
    rejudge(folder, "fake", path, QUIET)
    before = path.read_bytes()
    fake.name = "other"
    with pytest.raises(SafeguardError, match=r"holds verdicts of fake .*not of other"):
        rejudge(folder, "fake", path, QUIET)
    (folder / "file").write_text("")
    with pytest.raises(SafeguardError, match="cannot write"):
        rejudge(folder, "fake", folder / "file" / "x.jsonl", QUIET)
    assert path.read_bytes() == before


def test_two_commands_do_not_write_one_recording(folder: Path, fake: Fake) -> None:
    path = folder / "verdicts.jsonl"
    lock = held(folder / ".verdicts.jsonl.lock", "busy")
    with lock, pytest.raises(SafeguardError, match="another command is writing"):
        rejudge(folder, "fake", path, QUIET)
    assert not path.exists() and not fake.asked
    assert rejudge(folder, "fake", path, QUIET)["asked"]


def test_the_command(folder: Path) -> None:
    done = CliRunner().invoke(app, ["judge", str(folder), "--judge", "phrases", "--quiet"])
    assert done.exit_code == 0, done.output
    assert "| own_malicious | blank | none | 8 | 100.0% [51.0%, 100.0%] |" in done.output
    assert "judged-phrases-refusal.jsonl" in done.output
