"""Commands for measuring: evaluations, the modality gap, forms of gate, judges."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vlm_safeguard.calibration.budget import Budget
from vlm_safeguard.cli.options import (
    FalsePositives,
    Json,
    JudgeName,
    KeptStates,
    MaxNewTokens,
    Model,
    Precision,
    Quick,
    Quiet,
    ReadPictures,
    check_folder,
    extra_needed,
    load_model,
    loads_models,
    make_progress,
    print_json,
    ray_workers,
    read_guard,
)
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.load_options import LoadOptions

app = typer.Typer()

OWN_SETS = ("own_malicious", "own_jailbreak", "own_picture")
# What stands side by side by default; ``erase`` is an ablation and must be asked for by name.
DEFENCES_TO_COMPARE = ("none", "self-reminder", "goal-priority", "paper-formula", "guard")


@app.command()
@loads_models
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Folders, hub names, or embedded models.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for logs and results.")],
    defence: Annotated[
        list[str] | None,
        typer.Option(help="none, self-reminder, goal-priority, paper-formula, guard, or all."),
    ] = None,
    benchmark: Annotated[
        list[str] | None,
        typer.Option(
            help="own_malicious, xstest, prompts:FILE, ... (default: our own three sets)."
        ),
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option(help="text, blank or picture (default: all).")
    ] = None,
    guard: Annotated[
        Path | None, typer.Option(help="Guard folder, for the defences that need one.")
    ] = None,
    defence_text: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE: exact text of a prompt-based defence.")
    ] = None,
    attack: Annotated[
        str | None,
        typer.Option(
            help="Attack on every request: template:FILE, typography, or a way of writing such as "
            "leetspeak."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of published benchmarks, one per subfolder, or 'hub' to download them."
        ),
    ] = None,
    judge: JudgeName = "phrases",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Number of prompts per label and set.")
    ] = None,
    vqa: Annotated[
        int, typer.Option(min=0, help="Number of easy-vqa questions, to measure utility.")
    ] = 0,
    pairs: Annotated[
        int, typer.Option(min=0, help="Number of paired timing runs per defence.")
    ] = 0,
    throughput: Annotated[
        int, typer.Option(min=0, help="Number of rounds that time batch 1 against --batch.")
    ] = 0,
    labels: Annotated[
        Path | None,
        typer.Option(help="Labelled responses, to correct attack success for judge errors."),
    ] = None,
    max_new_tokens: MaxNewTokens = 32,
    batch: Annotated[int, typer.Option(min=1, max=4096)] = 32,
    engine: Annotated[
        Literal["transformers", "vllm", "ray"],
        typer.Option(help="What answers; ray: transformers in --workers processes."),
    ] = "transformers",
    workers: Annotated[int, typer.Option(min=1, help="Workers of ray.")] = 1,
    *,
    options: LoadOptions,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare defences on benchmarks, through inspect_ai; goes on where it was stopped."""
    with extra_needed():
        from vlm_safeguard.evaluation.harness.pipeline import Measure
        from vlm_safeguard.evaluation.harness.pipeline import evaluate as run
    from vlm_safeguard.evaluation.harness.execution import Plan, names
    from vlm_safeguard.evaluation.harness.results_page import markdown

    if engine == "vllm" and (pairs or throughput):
        raise SafeguardError(
            "--pairs and --throughput measure times in transformers: leave them out, or leave out "
            "--engine vllm"
        )
    plan = Plan(
        models=tuple(dict.fromkeys(models)),
        defences=names(defence or ["none", *(["guard"] if guard else [])], DEFENCES_TO_COMPARE),
        benchmarks=names(benchmark or [], OWN_SETS),
        settings=names(setting or [], ("text", "blank", "picture")),
        guard=str(guard) if guard else None,
        data=str(data) if data else None,
        judge=judge,
        limit=limit,
        vqa=vqa,
        max_tokens=max_new_tokens,
        batch=batch,
        loading=options,
        defence_texts=tuple(_named_file(given) for given in defence_text or []),
        attack=attack,
        workers=ray_workers(engine, workers),
        vllm=engine == "vllm",
    )
    measure = Measure(pairs=pairs, rounds=throughput, labels=labels)
    facts = run(plan, output, measure, make_progress(quiet))
    if json_:
        print_json(facts)
    else:
        print(markdown(facts), end="")


def _named_file(given: str) -> tuple[str, str]:
    name, _, file = given.partition("=")
    if not (name and file):
        raise SafeguardError(f"--defence-text {given!r}: give NAME=FILE, the defence and its text")
    return name, file


@app.command("check-results")
def check_results(
    first: Annotated[Path, typer.Argument(help="A results.json or its folder.")],
    second: Annotated[Path, typer.Argument(help="The same for the second run.")],
    json_: Json = False,
) -> None:
    """Compare two runs of an evaluation; exit code 1 if a rate differs."""
    from vlm_safeguard.evaluation.harness.rerun import compare_runs, flipped, read_run, rerun_page

    runs = read_run(first), read_run(second)
    found, flips = compare_runs(*runs), flipped(*runs)
    same = not any(one.differs for one in found)
    if json_:
        print_json({"same": same, "flipped": flips, "rates": [one.as_dict() for one in found]})
    else:
        print(rerun_page(found, flips), end="")
    if not same:
        raise typer.Exit(1)


@app.command()
@loads_models
def gap(
    model: Model,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for the page, its JSON and plots.")
    ],
    prompts: Annotated[
        Literal["malicious", "held"],
        typer.Option(
            help="malicious (evaluation set) or held (harder, held-back calibration prompts)."
        ),
    ] = "malicious",
    per_set: Annotated[int | None, typer.Option(min=1, help="Number of prompts per label.")] = None,
    guard: Annotated[Path | None, typer.Option(help="Guard whose gates are read as well.")] = None,
    name: Annotated[str, typer.Option(help="Prefix of the file names.")] = "gap",
    max_new_tokens: MaxNewTokens = 32,
    *,
    options: LoadOptions,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure which pictures weaken refusals and shift hidden states, and by how much."""
    from vlm_safeguard.evaluation.studies.modality_gap import study, write

    if Path(name).name != name:
        raise SafeguardError(f"--name {name!r} is not a file name: set the folder with -o")
    progress = make_progress(quiet)
    artifact = read_guard(guard) if guard else None
    loaded = load_model(model, options, progress)
    check_folder(output)
    found = study(
        loaded,
        prompt_set=prompts,
        per_set=per_set,
        guard=artifact,
        max_new_tokens=max_new_tokens,
        progress=progress,
    )
    write(found, output, name)
    if json_:
        print_json({key: value for key, value in found.items() if key != "responses"})
    else:
        print(output / f"{name}.md")


@app.command()
@loads_models
def gates(
    model: Model,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Markdown file to write.")
    ] = None,
    max_fpr: FalsePositives = 0.02,
    read_pictures: ReadPictures = False,
    quick: Quick = False,
    states: KeptStates = None,
    matmul_precision: Precision = "highest",
    *,
    options: LoadOptions,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare forms of gate on held-back prompts at equal false positives.

    It takes most of the states that a calibration with the same options keeps.
    """
    from vlm_safeguard.calibration.budget import Effort
    from vlm_safeguard.data.ocr import check_installed
    from vlm_safeguard.evaluation.studies import gate_forms
    from vlm_safeguard.evaluation.studies.provenance import provenance
    from vlm_safeguard.utils.files import write_whole

    if output is not None:
        if output.is_dir():
            raise SafeguardError(f"{output} is a folder: name the page's file")
        check_folder(output.parent)
    if states is not None:
        check_folder(states)
    if read_pictures:
        check_installed()
    progress = make_progress(quiet)
    loaded = load_model(model, options, progress)
    budget = Budget(false_positives=max_fpr)
    effort = Effort.quick() if quick else Effort()
    found = gate_forms.study(
        loaded,
        budget,
        effort,
        progress,
        reads_pictures=read_pictures,
        states=states,
        matmul_precision=matmul_precision,
    )
    made = provenance(loaded)
    text = gate_forms.page(model, found, made, budget)
    if json_:
        print_json(gate_forms.facts(found, made))
    else:
        print(text, end="")
    if output is not None:
        try:
            write_whole({output: text.encode()})
        except OSError as error:
            raise SafeguardError(f"cannot write {output}: {error.strerror}") from error


@app.command("judge")
def judge_again(
    run: Annotated[Path, typer.Argument(help="Folder of a finished evaluation.")],
    judge: JudgeName,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="File for the verdicts (default: in the folder)."),
    ] = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Judge the responses of an evaluation with another judge, or the unscored ones again."""
    with extra_needed():
        from vlm_safeguard.evaluation.harness.rejudge import page, rejudge

    facts = rejudge(run, judge, output, make_progress(quiet))
    if json_:
        print_json(facts)
    else:
        print(page(facts), end="")


@app.command("validate-judge")
def validate_judge(
    labels: Annotated[
        Path, typer.Argument(help="JSONL file with prompt, response and label on each line.")
    ],
    judge: JudgeName = "phrases",
    json_: Json = False,
) -> None:
    """Compare a judge with labels: sensitivity, specificity and kappa.

    Attack success on harmful prompts and refusals of harmless prompts are reported separately.
    """
    with extra_needed():
        from vlm_safeguard.evaluation.judges import (
            check_chosen_for,
            make_judge,
            read_labelled,
            validation_page,
        )
        from vlm_safeguard.evaluation.judges import validate as run

    rows, chosen = read_labelled(labels), make_judge(judge)
    check_chosen_for(chosen, rows, labels)
    harmless = sum(not row.harmful for row in rows)
    success = run(chosen, rows)
    told = harmless and chosen.asks == "refusal"
    refusals = run(chosen, rows, "harmless") if told else None
    if json_:
        apart = {"refusals": refusals.as_dict() if refusals else None, "harmless": harmless}
        print_json(success.as_dict() | apart)
    else:
        print(validation_page(success, refusals, harmless), end="")
