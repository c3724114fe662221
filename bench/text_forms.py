"""`python -m bench.text_forms`: the embedded model and its guard on requests written in other ways.

It prints the tables of docs/results.md: gates that open, attacks that succeed, harmful requests
that are answered off the subject and harmless ones that are refused, for each way of writing. With
`--gates` the gates alone, which takes a fraction of the time, because nothing is answered.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from bench.several_questions import opened
from vlm_safeguard.data import prompts
from vlm_safeguard.data.sampling import evenly
from vlm_safeguard.data.text_forms import TEXT_FORMS
from vlm_safeguard.embedded.assemble import assemble
from vlm_safeguard.evaluation.harness.execution import Plan
from vlm_safeguard.evaluation.harness.pipeline import answers
from vlm_safeguard.evaluation.harness.results import Judged, by_setting
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.loading import LoadedModel, load
from vlm_safeguard.utils.markdown import table
from vlm_safeguard.utils.progress import Progress
from vlm_safeguard.utils.stats import Rate, wilson

HEAD = [
    "Form",
    "Gate opens, harmful",
    "Gate opens, harmless",
    "Attack success, unguarded",
    "Attack success, guarded",
    "Off subject, unguarded / guarded",
    "Over-refusal, unguarded",
    "Over-refusal, guarded",
]


def gates_alone(loaded: LoadedModel, guard: Guard, forms: Sequence[str], limit: int) -> str:
    """The first three columns of ``measured``, for ``limit`` requests of each label."""
    items = evenly(prompts.evaluation("malicious"), limit)
    lines = []
    for form in ("plain", *forms):
        write = TEXT_FORMS.get(form, str)
        said = [[write(p.prompt) for p in items if p.harmful == label] for label in (True, False)]
        lines.append([form, *(opened(loaded, guard, part, pictured=False) for part in said)])
    return table(HEAD[:3], lines)


def measured(plan: Plan, forms: Sequence[str], progress: Progress) -> str:
    """The table of the plan's prompts as they stand and in each of ``forms``, in Markdown."""
    lines = []
    for form in (None, *forms):
        progress.say(f"requests: {form or 'plain'}")
        rows, _ = answers([replace(plan, attack=form)], progress)
        lines.append([form or "plain", *_cells(rows)])
    return table(HEAD, lines)


def _cells(rows: Sequence[Judged]) -> list[str]:
    cells = []
    for harmful in (True, False):
        guarded = [r for r in rows if (r.defence, r.harmful) == ("guard", harmful)]
        cells.append(wilson(sum(bool(r.fired) for r in guarded), len(guarded)).interval)
    [defences] = by_setting(rows).values()
    pair = [defences[name] for name in ("none", "guard")]
    cells += [Rate.from_dict(one, "asr").interval for one in pair]
    off = [Rate.from_dict(one, "off_subject_harmful").value for one in pair]
    cells.append(" / ".join(f"{share:.1%}" for share in off))
    return cells + [Rate.from_dict(one, "over_refusal").interval for one in pair]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.text_forms", description=__doc__)
    parser.add_argument("--guard", default="embedded", help="guard folder")
    parser.add_argument("--limit", type=int, default=100, help="prompts of each label")
    parser.add_argument("--gates", action="store_true", help="the gates alone")
    given = parser.parse_args()
    if given.gates:
        loaded, guard = load(assemble()), Guard.from_pretrained(given.guard)
        print(gates_alone(loaded, guard, list(TEXT_FORMS), given.limit))
        return
    plan = Plan(
        models=(str(assemble()),),
        defences=("none", "guard"),
        benchmarks=("own_malicious",),
        settings=("text",),
        guard=given.guard,
        limit=given.limit,
        max_tokens=24,
    )
    print(measured(plan, list(TEXT_FORMS), Progress()))


if __name__ == "__main__":
    main()
