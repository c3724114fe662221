"""Workers of Ray: the same answers and numbers as one process, also after one was killed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests import checkpoint, tiny
from tests.engines.interrupting import interrupted
from tests.server.live import MODEL, open_guard
from vlm_safeguard.engines.ray_pool import RayPool
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.load_options import LoadOptions
from vlm_safeguard.model.loading import load

ray = pytest.importorskip("ray")
WORKERS = 2


class Slow:
    """Takes its time, and says in which process."""

    def __init__(self, seconds: float) -> None:
        if seconds < 0:
            raise SafeguardError("no time is left")
        self._seconds = seconds

    def work(self, part: int) -> tuple[int, int]:
        if part < 0:
            raise SafeguardError(f"part {part} is none")
        time.sleep(self._seconds)
        return part, os.getpid()


class Sleeper:
    """Sleeps as long as a part says."""

    def work(self, part: int) -> tuple[int, int]:
        time.sleep(part)
        return part, os.getpid()


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint.save(tmp_path_factory.mktemp("tiny"))


def pid(actor: Any) -> int:
    return int(ray.get(actor.__ray_call__.remote(lambda _: os.getpid())))


@pytest.fixture(params=["", "killed"])
def killed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Kills the first worker of each pool at its third part, or none; whom it killed."""
    dead: list[int] = []
    make, work = RayPool.__init__, RayPool.work

    def init(self: Any, *arguments: Any) -> None:
        make(self, *arguments)
        self.first, self.parts = pid(self.actors[0]), count(1)

    def working(self: Any, part: Any) -> Any:
        if next(self.parts) == 3 and request.param:  # of several threads
            dead.append(self.first)
            os.kill(self.first, signal.SIGKILL)
        return work(self, part)

    monkeypatch.setattr(RayPool, "__init__", init)
    monkeypatch.setattr(RayPool, "work", working)
    yield dead
    assert bool(dead) == bool(request.param)


def test_a_killed_workers_part_is_done_again() -> None:
    pool: RayPool[int, tuple[int, int]] = RayPool(Slow, (0.5,), WORKERS)
    killed = pid(pool.actors[0])
    threading.Timer(0.7, os.kill, (killed, signal.SIGKILL)).start()
    found = list(pool.map(range(6)))
    pool.close()
    assert sorted(part for part, _ in found) == list(range(6))
    assert len({process for _, process in found} - {killed}) >= WORKERS


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_does_not_wait_for_parts_in_progress() -> None:
    pool: RayPool[int, tuple[int, int]] = RayPool(Sleeper, (), WORKERS)
    begun = interrupted(lambda: (part for part, _ in pool.map([0, 0, 300, 300, 300])), pool.close)
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join(60)  # they would keep the process
    assert time.monotonic() - begun < 100  # and not 300


def test_a_pool_has_the_room_of_one_that_was_closed() -> None:
    for _ in range(3):
        pool: RayPool[int, tuple[int, int]] = RayPool(Slow, (0.0,), WORKERS)
        assert [part for part, _ in pool.map([1])] == [1]
        pool.close()


def test_errors_of_workers_are_ours() -> None:
    with pytest.raises(SafeguardError, match="cannot start: no time is left"):
        RayPool(Slow, (-1.0,), 1)
    with pytest.raises(SafeguardError, match="ask for fewer with --workers"):
        RayPool(Slow, (0.0,), 10_000)
    pool: RayPool[int, tuple[int, int]] = RayPool(Slow, (0.0,), 1)
    with pytest.raises(SafeguardError, match=r"^part -1 is none"):
        list(pool.map([-1]))
    pool.close()


def test_a_batch_is_answered_as_by_one_process(
    folder: Path, tmp_path: Path, killed: list[int]
) -> None:
    from vlm_safeguard.server.batch_file import URL, read_tasks
    from vlm_safeguard.server.batch_run import BatchRun
    from vlm_safeguard.server.settings import Settings

    open_guard(load(folder).model).save_pretrained(tmp_path / "guard")
    rows = []
    for number in range(12):
        messages = [{"role": "user", "content": f"Question {number}"}]
        body = {"model": MODEL, "messages": messages, "max_tokens": 5}
        rows.append({"custom_id": str(number), "method": "POST", "url": URL, "body": body})
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = Settings(model=MODEL, batch=1, max_prompt_tokens=1000)
    run = BatchRun(str(folder), str(tmp_path / "guard"), settings, LoadOptions())
    tasks = read_tasks(tmp_path / "in.jsonl", run.identity)

    def said(kind: Any) -> dict[str, str]:
        found: list[dict[str, Any]] = []
        run.answer(tasks, kind, WORKERS, found.append, lambda _: None)
        assert len(found) == len(rows)
        return {
            one["custom_id"]: one["response"]["body"]["choices"][0]["message"]["content"]
            for one in found
        }

    assert said("ray") == said("transformers")


def test_an_evaluation_gives_the_same_numbers(
    folder: Path, tmp_path: Path, killed: list[int]
) -> None:
    pytest.importorskip("inspect_ai")
    from vlm_safeguard.evaluation.harness.engine import engine, made_once
    from vlm_safeguard.evaluation.harness.execution import Plan
    from vlm_safeguard.evaluation.harness.pipeline import Measure, evaluate
    from vlm_safeguard.utils.progress import Progress

    loaded = load(folder)
    guard = tiny.guard(loaded.model, [tiny.gate("text", 2), tiny.gate("vlm", 3)], layers=[2, 4])
    guard.save_pretrained(tmp_path / "guard")
    pages = []
    for workers in (0, WORKERS):
        plan = Plan(
            (str(folder),),
            ("none", "guard"),
            ("own_malicious",),
            ("text", "blank"),
            guard=str(tmp_path / "guard"),
            limit=4,
            max_tokens=4,
            batch=2,
            workers=workers,
        )
        facts = evaluate(plan, tmp_path / str(workers), Measure(), Progress(quiet=True))
        pages.append(facts["table"])
        engine(str(folder), plan.loading, plan.batch, workers).close()
    made_once.cache_clear()  # each run has workers of its own
    assert pages[0] == pages[1]
    first, second = (tmp_path / name / "responses.jsonl" for name in ("0", str(WORKERS)))
    assert first.read_text() == second.read_text()
