"""Memory that recording and generating take beyond the loaded model, each in a process of its own.

Run as `python -m bench.memory TASK NUMBER DTYPE`: prints JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from bench.guards import layer_sets, restoring
from bench.subjects import Subjects, embedded
from vlm_safeguard.data import drawings, prompts
from vlm_safeguard.data.inputs import Query
from vlm_safeguard.evaluation.metrics import paired_timing
from vlm_safeguard.model.recording import record

MB = 1e6


def measured(quick: bool, dtype: str = "float32") -> dict[str, Any]:
    """Peak growth in MB of recording by number of prompts, and of generating without and with a
    guard."""
    few, many = (8, 32) if quick else (100, 400)
    return {
        "recording": {number: _child("record", number, dtype) for number in (few, many)},
        "generating, batch 16": {
            "unguarded": _child("generate", 0, dtype),
            "guarded": _child("generate", 1, dtype),
        },
    }


def _child(task: str, number: int, dtype: str) -> float:
    """Run one task in a new process, which no other has warmed up."""
    command = [sys.executable, "-m", "bench.memory", task, str(number), dtype]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(json.loads(done.stdout))


def _private() -> int:
    """Bytes of memory of this process's own, without mapped files (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the system does not tell a process's own memory")


def growth(work: Callable[[], Any]) -> float:
    """By how many MB memory grows at most while ``work`` runs, looked at every 5 ms."""
    before, over = _private(), threading.Event()
    highest = before

    def watch() -> None:
        nonlocal highest
        while not over.wait(0.005):
            highest = max(highest, _private())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        over.set()
        watcher.join()
    return (max(highest, _private()) - before) / MB


def _record(subject: Subjects, number: int) -> float:
    texts = [pair.harmless for pair in prompts.anchors()]
    # One text for all: batches of one shape, so that only their number differs.
    items = [Query(max(texts, key=len), drawings.blank())] * number
    with tempfile.TemporaryDirectory() as folder:
        return growth(lambda: record(subject.loaded, items, Path(folder)))


def _generate(subject: Subjects, guarded: int) -> float:
    target, inputs = subject.vlm, subject.inputs(16, picture=True)
    guard = restoring(target, layer_sets(target.depth)["all"], text=True, is_open=True, tokens=None)
    with torch.inference_mode(), guard.attach(target.model) if guarded else nullcontext():
        return growth(lambda: paired_timing.write(target.model, inputs, 8))


if __name__ == "__main__":
    tasks = {"record": _record, "generate": _generate}
    print(json.dumps(tasks[sys.argv[1]](embedded(sys.argv[3]), int(sys.argv[2]))))
