"""``vlm-safeguard evaluate``: models x defences x benchmarks x settings, through inspect_ai.

The logs are inspect's own and can be looked at with ``inspect view``. A run that was killed goes
on where it stopped; what has succeeded is never run again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inspect_ai import eval_set
from inspect_ai.log import EvalLog, read_eval_log
from inspect_ai.model import Model, get_model

from vlm_safeguard.benchmarks import BENCHMARKS, load_benchmark
from vlm_safeguard.defences import BY_GUARD, DEFENCES
from vlm_safeguard.errors import DataError, SafeguardError
from vlm_safeguard.files import write_whole
from vlm_safeguard.harness.registry import TASKS, easy_vqa
from vlm_safeguard.harness.scorers import shared_judge
from vlm_safeguard.requests import SETTINGS

PLAN = "plan.json"
LOCK = ".lock"


@dataclass(frozen=True)
class Plan:
    """What to run. ``data`` holds a folder for each published benchmark, named like it."""

    models: tuple[str, ...]
    defences: tuple[str, ...]
    benchmarks: tuple[str, ...]
    settings: tuple[str, ...] = SETTINGS
    guard: str | None = None
    data: str | None = None
    judge: str = "phrases"
    limit: int | None = None
    vqa: int = 0  # easy-vqa questions for utility, 0 for none
    max_tokens: int = 32
    batch: int = 32
    dtype: str = "float32"
    device: str = "cpu"

    def check(self) -> list[tuple[str, str]]:
        """(benchmark, setting) of every task, after reading all of the data once.

        Raises:
            DataError: unknown names, no task at all, or what a benchmark's reader finds wrong.
        """
        for kind, given, known in (
            ("benchmark", self.benchmarks, tuple(BENCHMARKS)),
            ("defence", self.defences, DEFENCES),
            ("setting", self.settings, SETTINGS),
        ):
            for name in given:
                if name not in known:
                    raise DataError(f"unknown {kind} {name!r}: use one of {', '.join(known)}")
        shared_judge(self.judge)
        pairs: list[tuple[str, str]] = []
        for name in self.benchmarks:
            load_benchmark(name, self.folder(name), self.limit)
            have = BENCHMARKS[name].settings
            pairs += [(name, setting) for setting in self.settings if setting in have]
        if not pairs:
            raise DataError(
                f"nothing to run: {', '.join(self.benchmarks)} have none of the settings "
                f"{', '.join(self.settings)}"
            )
        return pairs

    def folder(self, benchmark: str) -> Path | None:
        """Where the files of a benchmark lie; None for what ships with the package."""
        return Path(self.data) if self.data and BENCHMARKS[benchmark].files else None


def run(plan: Plan, output: Path, display: str = "plain") -> list[EvalLog]:
    """Run, or go on with, a plan; its logs in ``output/logs``.

    Raises:
        DataError: see ``Plan.check``.
        SafeguardError: another run is at work in the folder, it belongs to another plan, or a
            task failed.
    """
    pairs = plan.check()
    models = list(_models(plan))  # a model or guard that cannot be read leaves no folder behind
    with _alone(output):
        _same_plan(plan, output)
        tasks = []
        for name, setting in pairs:
            folder = plan.folder(name)
            options = {"setting": setting, "judge": plan.judge, "limit": plan.limit}
            tasks.append(TASKS[name](**options, data=str(folder) if folder else None))
        if plan.vqa:
            tasks.append(easy_vqa(limit=plan.vqa))
        done, logs = eval_set(
            tasks,
            log_dir=str(output / "logs"),
            model=models,
            max_tokens=plan.max_tokens,
            max_connections=8 * plan.batch,
            max_samples=8 * plan.batch,
            max_tasks=4,
            display=display,  # type: ignore[arg-type]
            retry_attempts=1,
            continue_on_fail=True,
            log_realtime=False,
            log_model_api=False,
            score_display=False,
        )
    if not done:
        failed = [log for log in logs if log.status != "success"]
        raise SafeguardError(
            f"{len(failed)} of {len(logs)} evaluations did not finish ({_reason(failed)}). The "
            "same command goes on with what is missing"
        )
    # What eval_set returns are headers; the samples are in the files.
    return [read_eval_log(log.location) for log in logs]


def _reason(failed: Sequence[EvalLog]) -> str:
    """What went wrong first: with a whole evaluation, or with one of its samples."""
    for log in failed:
        if log.error:
            return log.error.message
        for sample in read_eval_log(log.location).samples or []:
            if sample.error:
                return f"{log.eval.task}, sample {sample.id}: {sample.error.message}"
    return "see the logs"


def _models(plan: Plan) -> Iterator[Model]:
    for name in plan.models:
        for defence in plan.defences:
            arguments: dict[str, Any] = {"defence": defence, "batch": plan.batch}
            arguments |= {"dtype": plan.dtype, "device": plan.device}
            if defence in BY_GUARD:
                arguments["guard"] = plan.guard
            yield get_model(f"vlm-safeguard/{name}", memoize=False, **arguments)


def _same_plan(plan: Plan, output: Path) -> None:
    """Write the plan, or refuse a folder that holds the logs of another one."""
    facts = json.dumps(vars(plan) | {"guard_sha256": _guard_digest(plan.guard)}, indent=1) + "\n"
    path = output / PLAN
    if path.exists() and path.read_text("utf-8") != facts:
        raise SafeguardError(
            f"{output} holds a run of another plan or guard ({PLAN}): name another folder with -o"
        )
    write_whole({path: facts.encode()})


def _guard_digest(folder: str | None) -> str:
    if folder is None:
        return ""
    try:
        return hashlib.sha256((Path(folder) / "guard.json").read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"cannot read the guard {folder}: {error.strerror}") from error


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Hold the folder for this process; the lock goes with the process, however it ends."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = (output / LOCK).open("w")
    except OSError as error:
        raise SafeguardError(f"cannot write to {output}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SafeguardError(
                f"another run is at work in {output}: wait for it or name another folder"
            ) from error
        yield


def names(given: Sequence[str], all_of: Sequence[str]) -> tuple[str, ...]:
    """``given``, or all where nothing or ``all`` was given; repeats dropped."""
    chosen = all_of if not given or "all" in given else given
    return tuple(dict.fromkeys(chosen))
