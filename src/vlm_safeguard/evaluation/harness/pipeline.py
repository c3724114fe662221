"""Runs an evaluation from plan to results: run, measure costs, write."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inspect_ai.log import EvalLog

from vlm_safeguard.data.inputs import Query, Setting, query, settings_of
from vlm_safeguard.data.prompts import Prompt
from vlm_safeguard.data.sampling import spaced, thin
from vlm_safeguard.errors import ImageError
from vlm_safeguard.evaluation.attacks import TYPOGRAPHY, make_attack
from vlm_safeguard.evaluation.benchmarks import load_benchmark
from vlm_safeguard.evaluation.defenses import Defence
from vlm_safeguard.evaluation.harness import outputs, results
from vlm_safeguard.evaluation.harness.engine import Answered, engine
from vlm_safeguard.evaluation.harness.execution import Plan, running
from vlm_safeguard.evaluation.harness.results import Judged
from vlm_safeguard.evaluation.harness.results_page import PREFIX
from vlm_safeguard.evaluation.harness.scorers import shared_judge
from vlm_safeguard.evaluation.harness.throughput import throughput
from vlm_safeguard.evaluation.judges import JudgeErrors, judge_errors
from vlm_safeguard.evaluation.metrics.likelihood import perplexity
from vlm_safeguard.evaluation.metrics.timing import request_ratio, time_ratios
from vlm_safeguard.guard import Guard, reads_text
from vlm_safeguard.model.fingerprint import dtype_name
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.utils.progress import Progress

PERPLEXITY_PROMPTS = 60  # harmless ones per defence


@dataclass(frozen=True)
class Measure:
    """What is measured beside the responses; none of it changes them.

    Attributes:
        pairs: Paired timing runs for each defence; 0 leaves time out.
        rounds: Rounds that measure prompts per second at batch 1 and at the plan's; 0 for none.
        labels: Labelled responses, to correct attack success for the judge's errors.
    """

    pairs: int = 0
    rounds: int = 0
    labels: Path | None = None


def evaluate(plan: Plan, output: Path, measure: Measure, progress: Progress) -> dict[str, Any]:
    """Run ``plan`` and write ``results.json``, ``results.md`` and the cut responses to ``output``,
    which is held for this process until all of it is written.

    Returns:
        What stands in ``results.json``.

    Raises:
        DataError: see ``Plan.check`` and ``judges.judge_errors``; nothing was run.
        SafeguardError: see ``run.running``.
    """
    plan.check()
    errors = judge_errors(shared_judge(plan.judge), measure.labels) if measure.labels else None
    progress.say("running the tasks (details: inspect view --log-dir " + f"{output / 'logs'})")
    with running(plan, output, "none" if progress.quiet else "plain") as logs:
        facts, rows = _measured(plan, logs, errors, measure, progress)
        outputs.write(facts, rows, output)
    return facts


def answers(
    plans: Sequence[Plan],
    progress: Progress,
    heard: Callable[[Sequence[Answered]], object] = lambda _: None,
) -> tuple[list[Judged], dict[str, Any]]:
    """What the models of ``plans`` say, judged, in the order of plans, cells and prompts; and
    easy-vqa accuracy by model and defence.

    Unlike ``evaluate`` it keeps nothing: the logs, which hold whole responses, are gone afterwards.
    ``heard`` is called with what was answered just now.

    Raises:
        DataError, SafeguardError: see ``execution.running``.
    """
    rows: list[Judged] = []
    accuracy: dict[str, Any] = {}
    counted = progress.track(itertools.count(), "responses")

    def hear(answered: Sequence[Answered]) -> None:
        list(itertools.islice(counted, len(answered)))
        heard(answered)

    for plan in plans:
        for name in plan.models:
            one = engine(name, plan.loading, plan.batch, plan.workers, plan.vllm)
            one.heard = hear
        with (
            tempfile.TemporaryDirectory(prefix="vlm-safeguard-") as folder,
            running(plan, Path(folder) / "run", "log", advice="") as logs,
        ):
            found, right = results.read(logs)
        sets = [load_benchmark(name, plan.folder(name), plan.limit) for name in plan.benchmarks]
        places = {prompt.id: n for n, prompt in enumerate(itertools.chain(*sets))}
        rows += results.in_order(sorted(found, key=lambda r: places[r.id]), vars(plan))
        accuracy |= right
    return rows, accuracy


def _measured(
    plan: Plan,
    logs: Sequence[EvalLog],
    errors: JudgeErrors | None,
    measure: Measure,
    progress: Progress,
) -> tuple[dict[str, Any], list[Judged]]:
    """What stands in the logs, and what the models cost."""
    facts, rows = outputs.summarise(plan, logs, errors)
    facts |= {"loaded": {}, "costs": {}, "throughput": {}}
    for model in plan.models:
        loaded = engine(model, plan.loading, plan.batch, plan.workers, plan.vllm).loaded
        facts["loaded"][model] = {
            "dtype": dtype_name(loaded.model),
            "device": loaded.device.type,
            "revision": loaded.revision,
        }
        facts["costs"][model] = {
            name: _costs(
                loaded,
                plan.defence(name),
                [r for r in rows if (r.model.removeprefix(PREFIX), r.defence) == (model, name)],
                plan,
                measure.pairs,
                progress,
            )
            for name in plan.defences
        }
        if measure.rounds:
            facts["throughput"][model] = _speeds(loaded, plan, measure.rounds, progress)
    return facts, rows


def _costs(
    loaded: LoadedModel,
    defence: Defence,
    rows: Sequence[Judged],
    plan: Plan,
    pairs: int,
    progress: Progress,
) -> dict[str, Any]:
    """Perplexity of answers to harmless prompts, under the bare LLM and given the bare prompt;
    and time relative to no defence, paired."""
    facts: dict[str, Any] = {"extra_passes": extra_passes(defence.guard)}
    answers = [r for r in rows if not r.harmful and r.response and r.setting == "text"]
    answers = spaced(answers, PERPLEXITY_PROMPTS)
    if answers:
        progress.say(f"perplexity under {defence.name}")
        asked, said = [r.prompt for r in answers], [r.response for r in answers]
        facts["perplexity"] = perplexity(loaded, asked, said)
    items = timed_requests(plan) if pairs else []
    if items:
        progress.say(f"time under {defence.name}, in pairs with no defence")
        per_token, first = time_ratios(
            loaded, defence.guard, items, reword=defence.reword, pairs=pairs
        )
        facts |= {"time_per_token_ratio": per_token, "first_token_ratio": first}
        facts["request_ratio"] = request_ratio(
            loaded, defence.guard, items, reword=defence.reword, pairs=pairs
        )
    return facts


def extra_passes(guard: Guard | None) -> int:
    """Forward passes per request beside the request's own. All that want the text share one pass
    over it: the gates that read it, and a steering that takes its coordinates from it."""
    return int(guard is not None and reads_text(guard))


def timed_requests(plan: Plan) -> list[Query]:
    """A few requests with their pictures, harmful ones if the benchmark has any."""
    prompts = _prompts(plan, 8)
    return _requests(plan, [p for p in prompts if p.harmful] or prompts)


def _speeds(loaded: LoadedModel, plan: Plan, rounds: int, progress: Progress) -> dict[str, Any]:
    """Prompts per second under each defence: a batch of harmful prompts and one of harmless."""
    items = _requests(plan, _prompts(plan, plan.batch))
    found = {}
    for name in plan.defences if items else ():
        progress.say(f"prompts per second under {name}")
        defence = plan.defence(name)
        found[name] = throughput(
            loaded,
            [Query(defence.reword(item.text), item.image) for item in items],
            defence.guard,
            batch=plan.batch,
            tokens=plan.max_tokens,
            rounds=rounds,
        )
    return found


def _prompts(plan: Plan, count: int) -> list[Prompt]:
    """``count`` prompts of each label of the plan's first benchmark."""
    name = plan.benchmarks[0]
    return thin(load_benchmark(name, plan.folder(name)), count)


def _requests(plan: Plan, prompts: Sequence[Prompt]) -> list[Query]:
    """With a blank picture where the prompt allows it, else with its own; then as the plan's attack
    makes them.

    A picture that cannot be read is left out here: its response is counted as unscored.
    """
    attack = make_attack(plan.attack) if plan.attack else None
    found = []
    for prompt in prompts:
        with suppress(ImageError):
            made = query(prompt, "text" if plan.attack == TYPOGRAPHY else _setting(prompt))
            found.append(made if attack is None else attack(made))
    return found


def _setting(prompt: Prompt) -> Setting:
    return "blank" if "blank" in settings_of(prompt) else "picture"
