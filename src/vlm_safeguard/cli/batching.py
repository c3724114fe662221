"""The command ``batch``: a file of chat requests in OpenAI's batch format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vlm_safeguard.cli.options import (
    GuardName,
    Json,
    Model,
    Quiet,
    check_folder,
    extra_needed,
    guard_or_default,
    loads_models,
    make_progress,
    print_json,
    ray_workers,
)
from vlm_safeguard.model.load_options import LoadOptions

app = typer.Typer()


@app.command()
@loads_models
def batch(
    requests: Annotated[Path, typer.Argument(help="JSONL file in OpenAI's batch format.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="JSONL file for the answers.")],
    model: Model = "embedded",
    guard: GuardName = None,
    engine: Annotated[
        Literal["transformers", "vllm", "ray"],
        typer.Option(help="What runs the model; ray: transformers in --workers processes."),
    ] = "transformers",
    workers: Annotated[int, typer.Option(min=1, help="Workers of ray.")] = 1,
    mode: Annotated[
        Literal["enforce", "refuse", "monitor"],
        typer.Option(help="Steer the answer, refuse at once, or only watch."),
    ] = "enforce",
    served_name: Annotated[
        str | None, typer.Option(help="Model name in the requests (default: MODEL).")
    ] = None,
    size: Annotated[
        int, typer.Option("--batch", min=1, max=256, help="Requests answered together.")
    ] = 8,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 1024,
    max_prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Longest prompt, in tokens, images included.")
    ] = 4096,
    *,
    options: LoadOptions,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Answer a file of chat requests under a guard; goes on where it was stopped.

    Each answer is what `serve` answers, in OpenAI's batch format. The file is in place when no
    answer is missing. The exit code is 1 if all answers are errors.
    """
    with extra_needed("answering a batch", "serve", ()):
        from vlm_safeguard.server.batch_file import answers, read_tasks
        from vlm_safeguard.server.batch_run import BatchRun
        from vlm_safeguard.server.settings import Settings

    ray_workers(engine, workers)
    settings = Settings(
        model=served_name or model,
        mode=mode,
        batch=size,
        waiting=2 * size,
        deadline=3600.0,
        max_tokens=max_tokens,
        default_tokens=min(Settings.default_tokens, max_tokens),
        max_prompt_tokens=max_prompt_tokens,
    )
    run = BatchRun(model, guard_or_default(model, guard), settings, options)
    tasks = read_tasks(requests, run.identity)
    check_folder(output.parent)
    progress = make_progress(quiet)
    with answers(output, tasks) as kept:
        known = len(tasks) - len(kept.missing)
        if known:
            progress.say(f"{known} of {len(tasks)} requests have an answer")
        if kept.missing:
            track = progress.track(kept.missing, "answers")
            next(track)  # it counts an item when the next one is asked for

            def put(answer: dict[str, Any]) -> None:
                kept.add(answer)
                next(track, None)

            run.answer(kept.missing, engine, workers, put, progress.say)
        kept.finish()
    found = {"requests": len(tasks), "errors": kept.failed, "output": str(output)}
    if json_:
        print_json(found)
    else:
        print(f"{output}: {len(tasks)} answers, {kept.failed} of them errors")
    if tasks and kept.failed == len(tasks):
        raise typer.Exit(1)
