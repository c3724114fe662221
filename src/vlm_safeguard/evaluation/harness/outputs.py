"""Collects the results of an evaluation as JSON and writes its files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from inspect_ai.log import EvalLog

from vlm_safeguard.evaluation.harness import results
from vlm_safeguard.evaluation.harness.execution import Plan
from vlm_safeguard.evaluation.harness.results_page import markdown
from vlm_safeguard.evaluation.judges import JudgeErrors
from vlm_safeguard.evaluation.report.labels import RESPONSE_WORDS, cut_words
from vlm_safeguard.utils.checkout import commit, git
from vlm_safeguard.utils.files import write_whole


def summarise(
    plan: Plan, logs: Sequence[EvalLog], errors: JudgeErrors | None = None
) -> tuple[dict[str, Any], list[results.Judged]]:
    """All figures of a run, and its judged responses; with ``errors`` of the judge also attack
    success corrected for them."""
    rows, accuracy = results.read(logs)
    rows = results.in_order(rows, vars(plan))
    accuracy = {
        model: {name: systems[name] for name in plan.defences if name in systems}
        for model, systems in accuracy.items()
    }
    facts = {
        "plan": {
            "defences": list(plan.defences),
            "benchmarks": list(plan.benchmarks),
            "judge": plan.judge,
            "limit": plan.limit,
            "max_tokens": plan.max_tokens,
        }
        | plan.loading.given()
        | ({"attack": plan.attack} if plan.attack else {})
        | ({"defence_texts": dict(plan.defence_texts)} if plan.defence_texts else {}),
        "made_with": commits(logs)
        | {
            "vlm-safeguard": version("vlm-safeguard"),
            "inspect_ai": version("inspect_ai"),
            "transformers": version("transformers"),
            "torch": version("torch"),
        },
        "judge_errors": errors.as_dict() if errors else None,
        "reference": results.reference(rows),
        "table": results.table(rows, errors),
        "easy_vqa": accuracy,
        "unscored": results.unscored(rows),
    }
    return facts, rows


def commits(logs: Sequence[EvalLog]) -> dict[str, Any]:
    """The commits that the responses were made at, as inspect recorded them in the logs.

    Inspect records the repository of the working directory; a commit that this package's checkout
    does not know is another project's, and counts as none recorded.

    Returns:
        ``commit``: the one that all logs record, else None; but where no log records any, the
        checkout's now. ``commits``: all that are recorded; a ``+`` marks changes that were not
        committed. ``logs_without_commit``: how many logs record none.
    """
    found = [_recorded(log) for log in logs]
    named = list(dict.fromkeys(one for one in found if one))
    without = found.count(None)
    agreed = named[0] if len(named) == 1 and not without else None
    return {
        "commit": agreed if named else commit(),
        "commits": named,
        "logs_without_commit": without,
    }


def _recorded(log: EvalLog) -> str | None:
    revision = log.eval.revision
    if revision is None:
        return None
    known = git("rev-parse", "--verify", "--quiet", "--short=10", revision.commit + "^{commit}")
    return known and known + ("+" if revision.dirty else "")


def write(facts: dict[str, Any], rows: Sequence[results.Judged], output: Path) -> None:
    """``results.json``, ``results.md`` and ``responses.jsonl`` (cut), each whole or not at all."""
    lines = (
        {
            "model": r.model,
            "defence": r.defence,
            "benchmark": r.benchmark,
            "setting": r.setting,
            "id": r.id,
            "cluster": r.cluster,
            "label": r.label,
            "verdict": r.verdict,
            "reason": r.reason,
            "fired": r.fired,
            "response": cut_words(r.response, RESPONSE_WORDS),
        }
        for r in rows
    )
    responses = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_whole(
        {
            output / "results.json": (json.dumps(facts, indent=1, allow_nan=False) + "\n").encode(),
            output / "results.md": markdown(facts).encode(),
            output / "responses.jsonl": responses.encode(),
        }
    )
