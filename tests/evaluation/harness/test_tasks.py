"""Tasks of inspect, and pictures that cannot be read."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from inspect_ai import eval as run_inspect

from vlm_safeguard.data import prompts
from vlm_safeguard.data.inputs import queries
from vlm_safeguard.errors import DataError
from vlm_safeguard.evaluation.harness import execution as run
from vlm_safeguard.evaluation.harness import results, tasks
from vlm_safeguard.evaluation.harness.pipeline import Measure, evaluate
from vlm_safeguard.utils.progress import Progress


def published(folder: Path, pictures: dict[int, bytes]) -> Path:
    """MM-Harmful Bench's format with our own questions."""
    images = folder / "mm_harmful_bench" / "images"
    images.mkdir(parents=True)
    rows = [{"image_url": "", "question": f"What is in picture {n}?"} for n in pictures]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (images.parent / "questions.jsonl").write_text(text)
    for number, data in pictures.items():
        (images / f"{number}.jpg").write_bytes(data)
    return folder


def sound() -> bytes:
    """A picture that can be read."""
    [item] = queries(prompts.evaluation("picture")[:1], "picture")
    return base64.b64decode(tasks.data_uri(item.image).partition(",")[2])


def test_a_setting_that_a_task_lacks_is_named() -> None:
    with pytest.raises(DataError, match="own_picture has no setting 'text': use one of picture"):
        tasks.benchmark_task("own_picture", "text")


def test_a_task_counts_a_corrupt_picture_as_unscored(folder: Path, tmp_path: Path) -> None:
    data = published(tmp_path, {0: sound(), 1: b"\xff\xd8\xff broken", 2: sound()})
    [log] = run_inspect(
        "vlm_safeguard/mm_harmful_bench",
        model=f"vlm-safeguard/{folder}",
        task_args={"data": str(data)},
        log_dir=str(tmp_path / "logs"),
        display="none",
        max_tokens=4,
    )
    assert log.status == "success" and log.results
    assert (log.results.scores[0].scored_samples, log.results.scores[0].unscored_samples) == (2, 1)
    rows, _ = results.read([log])
    assert [r.verdict is None for r in rows] == [False, True, False]
    assert "damaged" in rows[1].reason
    [entry] = results.table(rows)
    assert (entry["n"], entry["unscored"], entry["asr_n"]) == (3, 1, 2)


def test_a_picture_that_cannot_be_read_stops_no_timing(folder: Path, tmp_path: Path) -> None:
    """All responses are there by then: what they cost is measured on the other prompts."""
    data = published(tmp_path, {0: b"\xff\xd8\xff broken", 1: sound()})
    plan = run.Plan(
        (str(folder),), ("none",), ("mm_harmful_bench",), data=str(data), max_tokens=2, batch=2
    )
    facts = evaluate(plan, tmp_path / "out", Measure(pairs=1, rounds=1), Progress(quiet=True))
    assert [(e["n"], e["unscored"]) for e in facts["table"]] == [(2, 1)]
    assert "damaged" in facts["unscored"][0]["reason"]
    assert facts["costs"][str(folder)]["none"]["first_token_ratio"] > 0
    assert facts["throughput"][str(folder)]["none"]["prompts"] == 1
