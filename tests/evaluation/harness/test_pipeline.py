"""The whole evaluation: rates, timing and throughput in one command."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, ClassVar

import pytest
from filelock import FileLock, Timeout
from inspect_ai.log import read_eval_log

from tests import tiny
from tests.paths import LABELS
from vlm_safeguard.data import drawings as pictures
from vlm_safeguard.data import prompts
from vlm_safeguard.data.inputs import Query, queries
from vlm_safeguard.evaluation.harness import execution as run
from vlm_safeguard.evaluation.harness import outputs as report
from vlm_safeguard.evaluation.harness.pipeline import Measure, evaluate, extra_passes
from vlm_safeguard.evaluation.harness.throughput import throughput
from vlm_safeguard.evaluation.metrics import timing
from vlm_safeguard.model.load_options import LoadOptions
from vlm_safeguard.model.loading import load
from vlm_safeguard.utils.progress import Progress


def test_all_that_want_the_text_share_one_pass() -> None:
    model = tiny.llava()
    text, vlm = tiny.gate("text", 2), tiny.gate("vlm", 3)
    assert extra_passes(None) == 0
    assert extra_passes(tiny.guard(model, [text, text, vlm])) == 1
    assert extra_passes(tiny.guard(model, [vlm], reference="text")) == 1
    assert extra_passes(tiny.guard(model, [vlm], reference="anchor")) == 0
    assert extra_passes(tiny.guard(model, [vlm], mode="add", query="pass")) == 0


def test_a_whole_request_is_timed_with_the_reading_of_its_picture(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reader:
        known: ClassVar[set[bytes]] = set()
        fresh: ClassVar[list[bytes]] = []

        def words(self, picture: Any) -> str:
            if picture.tobytes() not in self.known:
                self.fresh.append(picture.tobytes())
            self.known.add(picture.tobytes())
            return "water the plants"

        def forget(self) -> None:
            self.known.clear()

    monkeypatch.setattr("vlm_safeguard.model.chat.reader", Reader)
    monkeypatch.setattr(timing, "reader", Reader)
    loaded = load(folder)
    guard = tiny.guard(loaded.model, [tiny.gate("text", 2)])
    reads = tiny.changed(guard, reads_pictures=True)
    items = [Query("Hello", pictures.blank())]
    assert timing.request_ratio(loaded, reads, items, tokens=2, pairs=3) > 0
    drawn = pictures.draw_text(timing.WORDS_TO_READ).tobytes()
    assert Reader.fresh == [drawn] * 3
    assert timing.request_ratio(loaded, None, items, tokens=2, pairs=1) > 0
    assert len(Reader.fresh) == 3


def test_the_whole_command_writes_results(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = run.Plan(
        (str(folder),),
        ("none", "goal-priority"),
        ("own_malicious",),
        ("text", "blank"),
        limit=2,
        vqa=4,
        max_tokens=4,
        batch=3,
        loading=LoadOptions("bfloat16", "cpu"),
    )
    measure = Measure(pairs=2, rounds=2, labels=LABELS)
    write = report.write

    def still_held(*given: Any) -> None:
        with pytest.raises(Timeout):
            FileLock(tmp_path / "out" / run.LOCK, blocking=False).acquire()
        write(*given)

    monkeypatch.setattr(report, "write", still_held)
    facts = evaluate(plan, tmp_path / "out", measure, Progress(quiet=True))
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == facts
    assert len(facts["table"]) == 4 and all(entry["n"] == 4 for entry in facts["table"])
    costs = facts["costs"][str(folder)]
    assert set(costs) == {"none", "goal-priority"}
    assert costs["goal-priority"]["first_token_ratio"] > 1  # a longer prompt
    assert costs["goal-priority"]["request_ratio"] > 0
    assert facts["easy_vqa"][f"vlm-safeguard/{folder}"]["none"]["n"] == 4
    lines = (tmp_path / "out" / "responses.jsonl").read_text().splitlines()
    assert len(lines) == 16
    speed = facts["throughput"][str(folder)]["goal-priority"]
    assert (speed["prompts"], speed["batch"], speed["rounds"]) == (6, 3, 2)
    assert speed["same"] <= 6  # a processor's bfloat16 may round a row otherwise in a batch
    assert 0 < speed["ratio_low"] <= speed["ratio"] <= speed["ratio_high"]
    page = (tmp_path / "out/results.md").read_text()
    assert "| own_malicious | blank | goal-priority |" in page and "ASR corrected" in page
    for defence in ("none", "goal-priority"):  # a row of costs and one of speeds
        assert len([line for line in page.splitlines() if line.startswith(f"| {defence} |")]) == 2
    assert (facts["plan"]["dtype"], facts["plan"]["device"]) == ("bfloat16", "cpu")
    used = facts["loaded"][str(folder)]
    assert used == {"dtype": "bfloat16", "device": "cpu", "revision": ""}
    logged = next((tmp_path / "out" / "logs").glob("*.eval"))
    assert read_eval_log(str(logged), header_only=True).eval.model_args["dtype"] == "bfloat16"


def test_prompts_per_second_are_of_the_same_responses(folder: Path) -> None:
    items = queries(prompts.evaluation("malicious")[:5], "blank")
    before = set(threading.enumerate())
    found = throughput(load(folder), items, None, batch=3, tokens=4, rounds=2)
    assert (found["prompts"], found["batch"], found["same"]) == (5, 3, 5)
    assert found["single"] > 0 and found["batched"] > 0
    assert set(threading.enumerate()) <= before  # its engines have ended
