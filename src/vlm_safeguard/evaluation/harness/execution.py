"""Runs models x defences x benchmarks x settings through inspect_ai (``vlm-safeguard evaluate``).

The logs are inspect's own and can be looked at with ``inspect view``. A run that was killed goes
on where it stopped; what has succeeded is never run again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from inspect_ai import eval_set
from inspect_ai.log import EvalLog, read_eval_log
from inspect_ai.model import Model, get_model

from vlm_safeguard.data.inputs import SETTINGS, Query
from vlm_safeguard.data.ocr import check_installed
from vlm_safeguard.embedded.assemble import guard_folder
from vlm_safeguard.errors import DataError, ImageError, Interrupted, SafeguardError
from vlm_safeguard.evaluation.attacks import TYPOGRAPHY, attack_file, make_attack
from vlm_safeguard.evaluation.benchmarks import (
    BENCHMARKS,
    PROMPTS,
    benchmark_of,
    load_benchmark,
)
from vlm_safeguard.evaluation.benchmarks.published import folder_of
from vlm_safeguard.evaluation.defenses import BY_GUARD, DEFENCES, Defence, make_defence
from vlm_safeguard.evaluation.harness.inspect_registry import easy_vqa
from vlm_safeguard.evaluation.harness.provider import VlmSafeguardAPI
from vlm_safeguard.evaluation.harness.run_identity import claim, file_digest, prompts_digest
from vlm_safeguard.evaluation.harness.scorers import shared_judge
from vlm_safeguard.evaluation.harness.tasks import make_task
from vlm_safeguard.evaluation.judges.factory import judge_file
from vlm_safeguard.guard import reads_pictures
from vlm_safeguard.model.load_options import LoadOptions
from vlm_safeguard.utils.locks import held

LOCK = ".lock"
GOES_ON = ". The same command goes on with what is missing"


@dataclass(frozen=True)
class Plan:
    """What to run.

    ``data`` holds a folder for each published benchmark, named like it; or is ``hub``, see
    ``benchmarks.published``. ``defence_texts``: (defence, file with its exact wording).
    """

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
    loading: LoadOptions = field(default_factory=LoadOptions)
    defence_texts: tuple[tuple[str, str], ...] = ()
    attack: str | None = None
    workers: int = 0  # processes of Ray that answer, 0 for this one
    vllm: bool = False  # vLLM answers

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
                if name not in known and not (kind == "benchmark" and name.startswith(PROMPTS)):
                    raise DataError(f"unknown {kind} {name!r}: use one of {', '.join(known)}")
        self._check_vllm()
        shared_judge(self.judge)
        pairs: list[tuple[str, str]] = []
        for name in self.benchmarks:
            load_benchmark(name, self.folder(name), self.limit)
            have = benchmark_of(name).settings
            pairs += [(name, setting) for setting in self.settings if setting in have]
        if not pairs and not self.vqa:
            raise DataError(
                f"nothing to run: {', '.join(self.benchmarks)} have none of the settings "
                f"{', '.join(self.settings)}"
            )
        self._check_texts()
        self._check_attack({setting for _, setting in pairs})
        return pairs

    def _check_vllm(self) -> None:
        if not self.vllm:
            return
        if len(self.models) > 1:
            raise DataError("vLLM keeps its memory until the end: evaluate one model at a time")
        for name in self.defences:
            if name in BY_GUARD and name != "guard":
                raise DataError(
                    f"the defence {name} needs hooks in transformers: leave it out, or leave out "
                    "--engine vllm"
                )

    def _check_texts(self) -> None:
        for name, file in self.defence_texts:
            if name not in self.defences:
                raise DataError(f"a text is given for the defence {name}, which is not run")
            make_defence(name, self.guard, file)
        if len(dict(self.defence_texts)) < len(self.defence_texts):
            raise DataError("a defence has one text: give --defence-text once for each")

    def _check_attack(self, settings: set[str]) -> None:
        if self.attack is None:
            return
        attack = make_attack(self.attack)
        if self.vqa:
            raise DataError("easy-vqa measures utility without an attack: leave out --vqa")
        if self.attack != TYPOGRAPHY:
            return
        if settings != {"text"}:
            raise DataError(
                f"the attack {TYPOGRAPHY} draws the request as its picture: use --setting text "
                "alone"
            )
        for name in self.benchmarks:
            for prompt in load_benchmark(name, self.folder(name), self.limit):
                try:
                    attack(Query(prompt.prompt, None))
                except ImageError as error:
                    raise DataError(f"{prompt.id} cannot be drawn: {error}") from error

    def folder(self, benchmark: str) -> Path | None:
        """Where the files of a benchmark lie; None for what ships with the package."""
        return folder_of(benchmark, self.data)

    def defence(self, name: str) -> Defence:
        """The defence called ``name``, with its guard or its text."""
        guard = self.guard if name in BY_GUARD else None
        return make_defence(name, guard, dict(self.defence_texts).get(name))

    def as_dict(self) -> dict[str, Any]:
        """All settings; what was added to plans later, only where it is given."""
        later = ("defence_texts", "attack", "workers", "vllm")
        facts = {key: value for key, value in vars(self).items() if value or key not in later}
        return facts | facts.pop("loading").given()


@contextmanager
def running(
    plan: Plan, output: Path, display: str = "plain", advice: str = GOES_ON
) -> Iterator[list[EvalLog]]:
    """Run, or go on with, a plan, and hold its folder for this process until the block ends.

    Args:
        advice: what to say to a user whose run did not finish.

    Raises:
        DataError: see ``Plan.check``.
        SafeguardError: another run is at work in the folder, it belongs to another plan or other
            models or data, or a task failed; ``Interrupted`` where it was stopped.
    """
    pairs = plan.check()
    if any(reads_pictures(plan.defence(name).guard) for name in plan.defences):
        check_installed()
    models = list(_models(plan))  # a model or guard that cannot be read leaves no folder behind
    busy = f"another run is at work in {output}: wait for it or name another folder"
    with held(output / LOCK, busy):
        digest = ""
        if plan.guard:
            digest = file_digest(guard_folder(plan.guard) / "guard.json", "the guard")
        claim(output, plan.as_dict() | {"guard_sha256": digest}, _digests(plan, models))
        tasks = []
        for name, setting in pairs:
            folder = plan.folder(name)
            options = {"setting": setting, "judge": plan.judge, "limit": plan.limit}
            tasks.append(make_task(name, str(folder) if folder else None, **options))
        if plan.vqa:
            tasks.append(easy_vqa(limit=plan.vqa))
        with redirect_stdout(sys.stderr):  # inspect's progress; what we print there is data
            done, logs = eval_set(
                tasks,
                log_dir=str(output / "logs"),
                model=models,
                max_tokens=plan.max_tokens,
                max_connections=8 * plan.batch * max(1, plan.workers),
                max_samples=8 * plan.batch * max(1, plan.workers),
                max_tasks=4,
                display=display,  # type: ignore[arg-type]
                retry_attempts=1,
                continue_on_fail=True,
                log_realtime=False,
                log_model_api=False,
                score_display=False,
            )
        wanted = len(tasks) * len(models)
        finished = sum(log.status == "success" for log in logs)
        if not done or finished < wanted:  # an interrupted run may count as done, without its logs
            failed = [log for log in logs if log.status != "success"]
            why = _reason(failed)
            kind = SafeguardError if why else Interrupted
            raise kind(
                f"{wanted - finished} of {wanted} evaluations did not finish "
                f"({why or 'interrupted'}){advice}"
            )
        # What eval_set returns are headers; the samples are in the files.
        yield [read_eval_log(log.location) for log in logs]


def _reason(failed: Sequence[EvalLog]) -> str:
    """What went wrong first, with a whole evaluation or with one of its samples; "" for nothing:
    it was interrupted."""
    for log in failed:
        if log.error:
            return log.error.message
        for sample in read_eval_log(log.location).samples or []:
            if sample.error:
                return f"{log.eval.task}, sample {sample.id}: {sample.error.message}"
    return ""


def _models(plan: Plan) -> Iterator[Model]:
    texts = dict(plan.defence_texts)
    for name in plan.models:
        for defence in plan.defences:
            optional: dict[str, Any] = {
                "guard": plan.guard if defence in BY_GUARD else None,
                "defence_text": texts.get(defence),
                "attack": plan.attack,
                "workers": plan.workers,
                "vllm": plan.vllm,
            }
            given = {key: value for key, value in optional.items() if value}
            arguments: dict[str, Any] = {"defence": defence, "batch": plan.batch}
            arguments |= plan.loading.given() | given
            yield get_model(f"vlm-safeguard/{name}", memoize=False, **arguments)


def _digests(plan: Plan, models: Sequence[Model]) -> dict[str, str]:
    """SHA-256 of models, prompts and texts, by what they are of."""
    found = {}
    for api in (cast(VlmSafeguardAPI, model.api) for model in models):
        found[f"weights of {api.model_name}"] = api.provenance["model_sha256"]
        found[f"chat template of {api.model_name}"] = api.provenance["template_sha256"]
    for name in plan.benchmarks:
        prompts = load_benchmark(name, plan.folder(name), plan.limit)
        found[f"prompts of {name}"] = prompts_digest(prompts)
    for name, text in plan.defence_texts:
        found[f"text of {name}"] = file_digest(Path(text), "the defence's text")
    if plan.attack and (wording := attack_file(plan.attack)):
        found["text of the attack"] = file_digest(wording, "the attack's text")
    if file := judge_file(plan.judge):
        found["file of the judge"] = file_digest(file, "the judge's file")
    return found


def names(given: Sequence[str], all_of: Sequence[str]) -> tuple[str, ...]:
    """``given``, or all where nothing was; ``all`` among them stands for all; repeats dropped."""
    chosen = [one for name in given or ["all"] for one in (all_of if name == "all" else [name])]
    return tuple(dict.fromkeys(chosen))
