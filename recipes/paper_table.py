"""The paper's comparison on one model: calibrate a guard, evaluate, write the table.

python recipes/paper_table.py MODEL --data DATA -o OUTPUT

The same command goes on where it was stopped: a guard in OUTPUT/guard is used as it is, and
finished evaluations in OUTPUT/run are kept. See README.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm_safeguard.artifact.serialization import CONFIG_FILE
from vlm_safeguard.cli import main
from vlm_safeguard.cli.options import (
    JudgeName,
    MaxNewTokens,
    Model,
    check_folder,
    extra_needed,
    loads_models,
    make_progress,
)
from vlm_safeguard.evaluation.benchmarks import benchmark_of
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.load_options import LoadOptions
from vlm_safeguard.utils.files import write_whole
from vlm_safeguard.utils.markdown import table
from vlm_safeguard.utils.progress import Progress
from vlm_safeguard.utils.stats import Rate

if TYPE_CHECKING:
    from vlm_safeguard.evaluation.harness.execution import Plan

BENCHMARKS = ("malicious_instruct", "jailbreak_instructions", "mm_harmful_bench")
COUNTS = ("garbled", "off_subject", "unscored")  # of responses
NOTE = (
    "Rates have 95% Wilson intervals, clustered by question, and counts. `kept` is the share "
    "refused of the prompts that the model refuses as text without a defence. `garbled` (empty "
    "ones too), `off subject` (the response only repeats the request) and `unscored` are numbers "
    "of responses. Garbled responses and those off the subject are among the prompts of a rate, "
    "and count neither as a success nor as a refusal. Unscored ones are in no rate."
)
DEFENCES = {"none": "no defence", "paper-formula": "paper's formula", "guard": "guard"}
Row = dict[str, Any]  # benchmark, setting and, by the name of each defence, what it did

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@loads_models
def paper_table(
    model: Model,
    data: Annotated[
        str,
        typer.Option(help="Folder of the three benchmarks, or 'hub' to download them."),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for guard, logs, results and table.")
    ],
    judge: JudgeName = "phrases",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Number of prompts per set (default: all).")
    ] = None,
    max_new_tokens: MaxNewTokens = 32,
    batch: Annotated[int, typer.Option(min=1, max=4096)] = 16,
    *,
    options: LoadOptions,
) -> None:
    """Attack success on the paper's three sets without a defence, with the paper's formula and with
    the guard, in every setting."""
    with extra_needed():
        from vlm_safeguard.evaluation.harness.execution import Plan
        from vlm_safeguard.evaluation.harness.pipeline import Measure, evaluate

    guard, progress = output / "guard", make_progress(quiet=False)
    plan = Plan(
        models=(model,),
        defences=tuple(DEFENCES),
        benchmarks=BENCHMARKS,
        guard=str(guard),
        data=data,
        judge=judge,
        limit=limit,
        max_tokens=max_new_tokens,
        batch=batch,
        loading=options,
    )
    plan.check()  # finds missing data now, not after the calibration
    for folder in check_folder(output):
        folder.rmdir()  # a calibration that fails leaves nothing
    ensure_guard(plan, guard, progress)
    facts = evaluate(plan, output / "run", Measure(), progress)
    rows = by_cell(facts["table"])
    used = facts["loaded"][model]
    page = markdown(model, used["dtype"], facts["plan"], rows)
    record = {"model": model, "loaded": used, "plan": facts["plan"]}
    record |= {"made_with": facts["made_with"], "table": rows}
    write_whole(
        {
            output / "table.md": page.encode(),
            output / "table.json": (json.dumps(record, indent=1, allow_nan=False) + "\n").encode(),
        }
    )
    print(page, end="")


def ensure_guard(plan: Plan, folder: Path, progress: Progress) -> None:
    """Calibrate a guard into ``folder``, or check the one that is there.

    Raises:
        CalibrationError: no guard helps on this model; nothing is saved.
        GuardError: the guard is damaged, or belongs to another model or dtype.
    """
    from vlm_safeguard.calibration.calibrate import calibrate
    from vlm_safeguard.evaluation.harness.engine import engine

    [model] = plan.models
    progress.say(f"loading {model}")
    # The evaluation uses the same engine, so the weights are in memory once.
    loaded = engine(model, plan.loading, plan.batch).loaded
    if (folder / CONFIG_FILE).exists():
        progress.say(f"using the guard in {folder}")
        Guard.from_pretrained(folder).check_model(loaded.model, loaded.processor)
    else:
        calibrate(loaded, progress=progress).save_pretrained(folder)


def by_cell(entries: Sequence[dict[str, Any]]) -> list[Row]:
    """The table's rows, from the entries of an evaluation: one for each set and setting."""
    rows: dict[tuple[str, str], Row] = {}
    for entry in entries:
        place = {"benchmark": entry["benchmark"], "setting": entry["setting"]}
        row = rows.setdefault((entry["benchmark"], entry["setting"]), place)
        row[entry["defence"]] = Rate.from_dict(entry, "asr").as_dict() | {
            "kept": Rate.from_dict(entry, "kept").as_dict() if "kept" in entry else None,
            "garbled": entry["degenerate"] + entry["empty"],
            "off_subject": entry["off_subject"],
            "unscored": entry["unscored"],
        }
    return list(rows.values())


def markdown(model: str, dtype: str, plan: dict[str, Any], rows: Sequence[Row]) -> str:
    """The page: what was run, and the table, with a row for each set, setting and defence."""
    cells = [
        [benchmark_of(row["benchmark"]).title, row["setting"], title, *_cells(row[defence])]
        for row in rows
        for defence, title in DEFENCES.items()
    ]
    head = ["set", "setting", "defence", "attack success", "kept"]
    head += [name.replace("_", " ") for name in COUNTS]
    return (
        f"Attack success of {model} in {dtype}, answers of at most {plan['max_tokens']} "
        f"tokens, judge `{plan['judge']}`.\n\n"
        f"{table(head, cells)}\n\n{NOTE}\n"
    )


def _cells(facts: dict[str, Any]) -> list[str]:
    rates = [str(Rate.from_dict(one)) if one and one["n"] else "" for one in (facts, facts["kept"])]
    return rates + [str(facts[name]) for name in COUNTS]


if __name__ == "__main__":
    main(app)
