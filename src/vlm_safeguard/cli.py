"""The command line: thin commands over the package. stdout is data, stderr is progress."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_safeguard.effort import Budget
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.files import check_writable

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="An inference-time safety guard for vision-language models.",
)

Model = Annotated[str, typer.Argument(help="Model folder or hub name; 'embedded' for our own.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="Where the model runs, for example cpu or cuda.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
OWN_SETS = ("own_malicious", "own_jailbreak", "own_picture")
# What stands side by side by default; ``erase`` is an ablation and must be asked for by name.
DEFENCES_TO_COMPARE = ("none", "self-reminder", "goal-priority", "paper-formula", "guard")


def _load(model: str, dtype: str, device: str, progress: Any) -> Any:
    """Load a model; the word ``embedded`` assembles and loads our own."""
    from vlm_safeguard import models
    from vlm_safeguard.demo.assemble import assemble

    name: str | Path = assemble(progress=progress.say) if model == "embedded" else model
    progress.say(f"loading {model}")
    return models.load(name, dtype, device)


def _progress(quiet: bool) -> Any:
    from transformers.utils import logging

    from vlm_safeguard.progress import Progress

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return Progress(quiet)


@app.command()
def assemble(
    cache: Annotated[Path | None, typer.Option(help="Cache folder to use.")] = None,
    quiet: Quiet = False,
) -> None:
    """Assemble the embedded VLM (once) and print its folder."""
    from vlm_safeguard.demo import assemble as demo

    print(demo.assemble(cache, progress=_progress(quiet).say))


@app.command()
def calibrate(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the guard.")],
    max_false_positives: Annotated[
        float, typer.Option(min=0.0, max=0.5, help="Budget on harmless requests.")
    ] = Budget.false_positives,
    max_kl: Annotated[
        float, typer.Option(min=0.0, help="Budget on the KL divergence, nats.")
    ] = Budget.kl,
    read_pictures: Annotated[
        bool, typer.Option("--read-pictures", help="Also read the words in pictures (extra: ocr).")
    ] = False,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Calibrate a guard for MODEL and save it, or fail with the reason and save nothing."""
    from vlm_safeguard.calibrate import calibrate as run

    if output.exists() and not output.is_dir():
        raise SafeguardError(f"{output} is a file: name a folder for the guard")
    fresh = not output.exists()
    try:
        check_writable(output)
    except OSError as error:
        raise SafeguardError(f"cannot write to {output}: {error.strerror}") from error
    if fresh:
        output.rmdir()  # a calibration that fails leaves nothing
    progress = _progress(quiet)
    loaded = _load(model, dtype, device, progress)
    budget = Budget(max_false_positives, max_kl)
    guard = run(loaded, budget=budget, reads_pictures=read_pictures, progress=progress)
    guard.save_pretrained(output)
    if json_:
        _print(guard.config.model_dump())
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
def doctor(
    model: Model,
    guard: Annotated[Path | None, typer.Argument(help="Guard folder to check on MODEL.")] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check MODEL: decoder, image tokens; and a guard on it: sign, separability, effect."""
    from vlm_safeguard.doctor import describe, diagnose, examine
    from vlm_safeguard.guard import Guard

    progress = _progress(quiet)
    artifact = Guard.from_pretrained(guard) if guard else None
    loaded = _load(model, dtype, device, progress)
    found = describe(loaded)
    checks = diagnose(loaded, artifact, progress=progress) if artifact else examine(found)
    if json_:
        facts = {"ok": all(c.ok for c in checks), "model": vars(found)}
        _print(facts | {"checks": [vars(c) for c in checks]})
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
        _print({"commit": address})
    else:
        print(address)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="What to ask.")],
    image: Annotated[Path | None, typer.Option(help="PNG, JPEG or WEBP picture.")] = None,
    guard: Annotated[Path | None, typer.Option(help="Guard folder to attach.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=4096)] = 128,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Answer one prompt, streaming, with or without a guard."""
    from vlm_safeguard.answer import stream
    from vlm_safeguard.guard import Guard
    from vlm_safeguard.images import open_image

    if not prompt.strip():
        raise SafeguardError("the prompt is empty: say what to ask with --prompt")
    progress = _progress(quiet)
    picture = open_image(image) if image else None
    artifact = Guard.from_pretrained(guard) if guard else None
    loaded = _load(model, dtype, device, progress)
    text, fired = stream(loaded, prompt, picture, artifact, max_new_tokens, None if json_ else _put)
    if json_:
        _print({"response": text, "guarded": artifact is not None, "fired": fired})
    else:
        print()


@app.command()
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Model folders or hub names, or 'embedded'.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for logs and results.")],
    defence: Annotated[
        list[str] | None, typer.Option(help="none, self-reminder, goal-priority, guard, ... or all")
    ] = None,
    benchmark: Annotated[
        list[str] | None, typer.Option(help="own_malicious, xstest, ... (default: our three own)")
    ] = None,
    setting: Annotated[list[str] | None, typer.Option(help="text, blank, picture")] = None,
    guard: Annotated[Path | None, typer.Option(help="Guard folder, for the guard's kind.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with a published benchmark in each subfolder.")
    ] = None,
    judge: Annotated[str, typer.Option(help="phrases, llama-guard:NAME, ...")] = "phrases",
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts of each label per set.")] = None,
    vqa: Annotated[int, typer.Option(min=0, help="easy-vqa questions for utility.")] = 0,
    pairs: Annotated[int, typer.Option(min=0, help="Paired timing runs per defence.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=4096)] = 32,
    batch: Annotated[int, typer.Option(min=1, max=4096)] = 32,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare defences on benchmarks, through inspect_ai; goes on where it was stopped."""
    try:
        from vlm_safeguard.harness.evaluate import evaluate as run
    except ModuleNotFoundError as error:
        if error.name != "inspect_ai":
            raise
        raise SafeguardError(
            "evaluating needs inspect_ai: pip install 'vlm-safeguard[eval]'"
        ) from error
    from vlm_safeguard.harness.report import markdown
    from vlm_safeguard.harness.run import Plan, names

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
    )
    facts = run(plan, output, pairs, _progress(quiet))
    if json_:
        _print(facts)
    else:
        print(markdown(facts), end="")


@app.command()
def gap(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for page and plots.")],
    per_set: Annotated[int | None, typer.Option(min=1, help="Prompts of each label.")] = None,
    guard: Annotated[Path | None, typer.Option(help="Also read this guard's gates.")] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Study the modality gap: which pictures weaken refusals, and move the states, how much."""
    from vlm_safeguard.gap import study, write
    from vlm_safeguard.guard import Guard

    try:
        check_writable(output)
    except OSError as error:
        raise SafeguardError(f"cannot write to {output}: {error.strerror}") from error
    progress = _progress(quiet)
    artifact = Guard.from_pretrained(guard) if guard else None
    loaded = _load(model, dtype, device, progress)
    found = study(loaded, per_set=per_set, guard=artifact, progress=progress)
    write(found, output)
    if json_:
        _print({key: value for key, value in found.items() if key != "responses"})
    else:
        print(f"{output / 'gap.md'}")


@app.command()
def gates(
    model: Model,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Page to write.")] = None,
    max_fpr: Annotated[float, typer.Option(min=0.001, max=0.5, help="Harmless stopped.")] = 0.02,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare forms of gate on held-back prompts: what each finds at the same cost."""
    from vlm_safeguard import gate_forms as forms
    from vlm_safeguard.effort import Effort
    from vlm_safeguard.files import write_whole

    progress = _progress(quiet)
    loaded = _load(model, dtype, device, progress)
    budget = Budget(false_positives=max_fpr)
    rows, together = forms.study(loaded, budget, Effort(), progress)
    text = forms.page(model, rows, together, budget)
    if output:
        write_whole({output: text.encode()})
    if json_:
        _print(forms.facts(rows, together))
    else:
        print(text, end="")


@app.command("validate-judge")
def validate_judge(
    labels: Annotated[Path, typer.Argument(help="JSONL: prompt, response, label on each line.")],
    judge: Annotated[str, typer.Option(help="phrases, llama-guard:NAME, ...")] = "phrases",
    json_: Json = False,
) -> None:
    """How often a judge is right on labelled responses: sensitivity, specificity, kappa."""
    from vlm_safeguard.judges import make_judge, read_labelled
    from vlm_safeguard.judges import validate as run

    found = run(make_judge(judge), read_labelled(labels))
    if json_:
        _print(found.as_dict())
    else:
        kappa = "none" if found.kappa is None else f"{found.kappa:.2f}"
        if found.kappa_low is not None:
            kappa += f" [{found.kappa_low:.2f}, {found.kappa_high:.2f}]"
        print(f"judge        {found.judge}, {found.n} labelled responses")
        print(f"sensitivity  {found.sensitivity}\nspecificity  {found.specificity}")
        print(f"kappa        {kappa}\nunscored     {found.unscored}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the report.")] = Path(
        "report"
    ),
    full: Annotated[
        bool, typer.Option("--full", help="All evaluation prompts and the paper's formula.")
    ] = False,
    prompts: Annotated[
        list[Path] | None, typer.Option(help="Also these harmful prompts, one a line.")
    ] = None,
    guard: Annotated[Path | None, typer.Option(help="Use this guard, do not calibrate.")] = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Assemble the embedded VLM, calibrate a guard, compare, write a report."""
    from vlm_safeguard.demo.run import run_demo

    summary = run_demo(output, full, prompts or [], guard, _progress(quiet))
    if json_:
        _print(summary)
    else:
        _headline(summary)


def _headline(summary: dict[str, Any]) -> None:
    for setting, systems in summary["settings"].items():
        for system, row in systems.items():
            print(
                f"{setting:8} {system:10} ASR {row['asr']:6.1%} [{row['asr_low']:.1%}, "
                f"{row['asr_high']:.1%}]  over-refusal {row['over_refusal']:6.1%}  degenerate "
                f"{row['degenerate']:.1%}  n = {row['n']}"
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


def _print(value: Any) -> None:
    json.dump(value, sys.stdout, indent=1, allow_nan=False)
    print()


def main() -> None:
    """Entry point: plain errors, exit code 1; Ctrl-C exits with 130 (typer)."""
    try:
        app(standalone_mode=True)
    except SafeguardError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
