"""Judges the responses of an evaluation again (``vlm-safeguard judge``).

Nothing is generated. Every verdict goes into a recording, batch by batch, so that a judging that
was stopped goes on from there; the recording can be replayed with ``recorded:FILE``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from inspect_ai.log import EvalLog, read_eval_log

from vlm_safeguard.errors import DataError, SafeguardError
from vlm_safeguard.evaluation.harness import results
from vlm_safeguard.evaluation.harness.results import Judged
from vlm_safeguard.evaluation.harness.run_identity import PLAN
from vlm_safeguard.evaluation.harness.scorers import NOT_ASKED, not_asked
from vlm_safeguard.evaluation.judges import Judge, Judgement, make_judge
from vlm_safeguard.evaluation.judges.judge_options import same_judge
from vlm_safeguard.evaluation.judges.judgement import Verdict, screen
from vlm_safeguard.evaluation.judges.recorded import Recording, read_recording
from vlm_safeguard.utils.jsonl import read_object
from vlm_safeguard.utils.locks import held
from vlm_safeguard.utils.markdown import table
from vlm_safeguard.utils.progress import Progress
from vlm_safeguard.utils.stats import Rate

BATCH = 64  # responses judged between two writings of the recording


def rejudge(run: Path, spec: str, output: Path | None, progress: Progress) -> dict[str, Any]:
    """Judge the responses in the logs of the evaluation in ``run`` with the judge ``spec``.

    What the recording holds is not asked again, nor, if it is the judge of the evaluation, what
    that has scored; what is unscored in either is. A prompt and response that recur are asked once.

    Args:
        output: The recording; None names it after the judge, in ``run``.

    Returns:
        For JSON: ``judge``, ``asks``, ``recording``, ``asked`` (responses asked about now),
        ``unfinished`` (evaluations of the run left out), ``table`` (see ``_table``) and the
        ``reasons`` of what is unscored, with their counts.

    Raises:
        DataError: ``run`` is no folder of an evaluation, or the recording is broken.
        SafeguardError: nothing in it is finished, the recording belongs to another judge, is being
            written or cannot be, or the judge cannot be made or used.
    """
    plan = _plan(run)
    judge = make_judge(spec)
    path = output or run / f"judged-{_slug(judge)}.jsonl"
    busy = f"another command is writing {path}: wait for it or name another file with -o"
    with held(path.with_name(f".{path.name}.lock"), busy):
        recording = _recording(path, judge)
        logs, unfinished = _finished(run, progress)
        rows = results.in_order(results.read(logs)[0], plan)
        if same_judge(spec, str(plan["judge"])):
            _take_over(rows, recording)
        asked = _ask(judge, rows, recording, path, progress)
    judged = [_judged(row, judge, recording) for row in rows]
    reasons = [r.reason for r in judged if r.verdict is None and r.reason != NOT_ASKED]
    return {
        "judge": judge.name,
        "asks": judge.asks,
        "recording": str(path) if path.exists() else None,
        "asked": asked,
        "unfinished": unfinished,
        "table": _table(judged),
        "reasons": dict(Counter(reasons)),
    }


def _take_over(rows: Sequence[Judged], recording: Recording) -> None:
    """Record the verdicts of the evaluation's own judge."""
    for row in rows:
        if row.answered and row.verdict is not None and _open(row, recording):
            verdict = cast(Verdict, row.verdict)
            recording.put(row.pair, Judgement(verdict, "judged in the run"))


def _ask(
    judge: Judge, rows: Sequence[Judged], recording: Recording, path: Path, progress: Progress
) -> int:
    """Ask about what the recording has no verdict on; how many that were."""
    wanted = [r for r in rows if r.answered and not _passed_over(r, judge) and _open(r, recording)]
    pairs = list(dict.fromkeys(row.pair for row in wanted))
    batches = [pairs[n : n + BATCH] for n in range(0, len(pairs), BATCH)]
    for batch in progress.track(batches, f"batches of {BATCH} responses before {judge.name}"):
        for pair, found in zip(batch, judge.judge(batch), strict=True):
            recording.put(pair, found)
        recording.write(path)
    if not batches and len(recording):
        recording.write(path)
    return len(pairs)


def _open(row: Judged, recording: Recording) -> bool:
    """Whether the recording has no verdict on this row."""
    found = recording.get(row.pair)
    return found is None or found.verdict is None


def _passed_over(row: Judged, judge: Judge) -> bool:
    """Whether ``judge`` says nothing of this row: garbled answers are told without it."""
    return not_asked(judge, row.label) and screen(*row.pair) is None


def _judged(row: Judged, judge: Judge, recording: Recording) -> Judged:
    """The row with the verdict that is recorded. A prompt without a response stays unscored."""
    if not row.answered:
        return row
    row = replace(row, asked=not not_asked(judge, row.label))
    if _passed_over(row, judge):
        return replace(row, verdict=None, reason=NOT_ASKED)
    found = recording.get(row.pair)
    if found is None:  # every row that is not passed over was asked about
        raise RuntimeError(f"{row.id} was not judged")
    return replace(row, verdict=found.verdict, reason=found.reason if not found.verdict else "")


def _table(rows: Sequence[Judged]) -> list[dict[str, Any]]:
    """Rates of each model, benchmark, setting and defence (see ``results.rates``).

    ``unscored`` counts what could not be judged, ``not_asked`` what the judge does not apply to.
    """
    found = []
    for place, group in results.grouped(rows, lambda row: (*row.cell, row.defence)).items():
        not_asked_about = sum(row.reason == NOT_ASKED for row in group)
        entry = dict(zip(results.PLACE, place, strict=True)) | results.rates(group)
        entry |= {"not_asked": not_asked_about, "unscored": entry["unscored"] - not_asked_about}
        found.append(entry)
    return found


def page(facts: dict[str, Any]) -> str:
    """The rates as a table in Markdown, what is missing from them, and where the verdicts are."""
    columns = ["Model", "Benchmark", "Setting", "Defence", "n", "ASR"]
    columns += ["Off subject, harmful", "Over-refusal", "Unscored", "Not asked"]
    rows = [
        [entry[name] for name in (*results.PLACE, "n")]
        + [_rate(entry, "asr"), entry["off_subject_harmful_count"], _rate(entry, "over_refusal")]
        + [entry["unscored"], entry["not_asked"]]
        for entry in facts["table"]
    ]
    lines = [
        table(columns, rows),
        "",
        f"Judge {facts['judge']}, rates with 95% Wilson intervals clustered by question.",
    ]
    if facts["unfinished"]:
        lines.append(
            f"Left out: {facts['unfinished']} evaluations of this run that are not finished."
        )
    lines += [f"Unscored, {count} times: {reason}" for reason, count in facts["reasons"].items()]
    if facts["recording"]:
        lines.append(f"Verdicts: {facts['recording']} (--judge recorded:FILE replays them)")
    return "\n".join(lines) + "\n"


def _rate(entry: dict[str, Any], name: str) -> str:
    rate = Rate.from_dict(entry, name)
    return rate.interval if rate.n else "–"


def _plan(run: Path) -> dict[str, Any]:
    path = run / PLAN
    if not path.is_file():
        raise DataError(
            f"{run} is not an evaluation folder: {PLAN} is missing. Name the folder that "
            "was given to evaluate with -o"
        )
    plan = read_object(path, "plan of an evaluation")
    names = ("benchmarks", "settings", "defences")
    if not isinstance(plan.get("judge"), str) or not all(
        isinstance(plan.get(name), list) for name in names
    ):
        raise DataError(f"{path} is not the plan of an evaluation")
    return plan


def _finished(run: Path, progress: Progress) -> tuple[list[EvalLog], int]:
    """The finished logs of a run, easy-vqa left out, and the number of those not finished.

    Raises:
        SafeguardError: none is finished.
    """
    found: list[EvalLog] = []
    unfinished = 0
    for path in progress.track(sorted((run / "logs").glob("*.eval")), "reading the logs"):
        try:
            header = read_eval_log(str(path), header_only=True)
        except Exception:  # a log that was cut short fails in zip, JSON and pydantic's own ways
            unfinished += 1
            continue
        if header.eval.task.endswith("easy_vqa"):
            continue
        if header.status == "success":
            found.append(read_eval_log(str(path)))
        else:
            unfinished += 1
    if not found:
        raise SafeguardError(
            f"{run} holds no finished evaluation: run its evaluate command again to resume it"
        )
    return found, unfinished


def _recording(path: Path, judge: Judge) -> Recording:
    """The recording at ``path`` to go on with, or a new one; tried out before long work."""
    if not path.exists():
        return Recording(judge.name, judge.asks)
    found = read_recording(path)
    if (found.judge, found.asks) != (judge.name, judge.asks):
        raise SafeguardError(
            f"{path} holds verdicts of {found.judge} ({found.asks}), not of {judge.name} "
            f"({judge.asks}): name another file with -o"
        )
    return found


def _slug(judge: Judge) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", f"{judge.name} {judge.asks}").strip("-")[-100:]
