"""An evaluation in vLLM gives the responses of one in transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.engines import tiny_vllm
from vlm_safeguard.data.inputs import Query
from vlm_safeguard.errors import DataError
from vlm_safeguard.model.load_options import LoadOptions

pytest.importorskip("vllm")
pytest.importorskip("inspect_ai")
execution = pytest.importorskip("vlm_safeguard.evaluation.harness.execution")
vllm_pool = pytest.importorskip("vlm_safeguard.evaluation.harness.vllm_pool")


def test_responses_are_those_of_transformers(tmp_path: Path) -> None:
    from vlm_safeguard.evaluation.harness.pipeline import Measure, evaluate
    from vlm_safeguard.utils.progress import Progress

    folder = tiny_vllm.save(tmp_path / "model")
    gates = [tiny_vllm.text_gate(), tiny.gate("vlm", 4)]
    guard = tiny_vllm.guard(tiny_vllm.loaded(folder), gates, layers=[2, 4])
    guard.save_pretrained(tmp_path / "guard")
    rows = []
    for vllm in (False, True):
        plan = execution.Plan(
            (str(folder),),
            ("none", "self-reminder", "guard"),
            ("own_malicious",),
            ("text", "blank"),
            guard=str(tmp_path / "guard"),
            limit=3,
            max_tokens=8,
            batch=4,
            vllm=vllm,
        )
        output = tmp_path / f"out-{vllm}"
        evaluate(plan, output, Measure(), Progress(quiet=True))
        rows.append([json.loads(row) for row in (output / "responses.jsonl").open()])
    assert rows[0] == rows[1]
    fired = {row["fired"] for row in rows[0] if row["defence"] == "guard"}
    assert fired == {True, False}


def test_a_failure_of_vllm_ends_the_evaluation_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_vllm.save(tmp_path / "model")
    monkeypatch.setenv("VLLM_PLUGINS", "")  # the guard's plugin is not loaded
    guard = tiny_vllm.guard(tiny_vllm.loaded(folder), [tiny.gate("vlm", 4)], layers=[2])
    guard.save_pretrained(tmp_path / "guard")
    plan = execution.Plan(
        (str(folder),),
        ("guard",),
        ("own_malicious",),
        ("text",),
        guard=str(tmp_path / "guard"),
        limit=1,
        vllm=True,
    )
    reason = "did not load the guard's plugin"
    with pytest.raises(Exception, match=reason), execution.running(plan, tmp_path / "out", "none"):
        pass


def test_nothing_of_vllm_outlives_its_process(tmp_path: Path) -> None:
    folder = tiny_vllm.save(tmp_path / "model")
    process = vllm_pool._Process(None, str(folder), LoadOptions(), 512, 4)
    assert len(process.ask([Query("How do I bake bread?", None)], 4)) == 1
    group = process._process.pid
    os.killpg(group, 0)  # it is there
    process.close()
    with pytest.raises(ProcessLookupError):
        os.killpg(group, 0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"defences": ("none", "paper-formula")}, "paper-formula needs hooks in transformers"),
        ({"models": ("one", "two")}, "one model at a time"),
    ],
)
def test_what_vllm_cannot_do_is_refused_before_anything_runs(
    changes: dict[str, Any], reason: str
) -> None:
    known: dict[str, Any] = {"models": ("one",), "defences": ("none",)}
    plan = execution.Plan(**known | {"benchmarks": ("own_malicious",), "vllm": True} | changes)
    with pytest.raises(DataError, match=reason):
        plan.check()
