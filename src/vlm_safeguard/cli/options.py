"""Options and helpers shared by all commands: loading, progress, printing."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.load_options import LoadOptions
from vlm_safeguard.utils.files import check_writable
from vlm_safeguard.utils.matmul import MatmulPrecision

if TYPE_CHECKING:  # imports torch, and --help needs none
    from vlm_safeguard.guard import Guard

Model = Annotated[str, typer.Argument(help="Folder, hub name, 'embedded' or 'embedded-1.5b'.")]
GuardName = Annotated[
    str | None,
    typer.Option(help="Guard folder or hub name (default: that of 'embedded')."),
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, max=4096)]
FalsePositives = Annotated[
    float, typer.Option(min=0.001, max=0.5, help="Share of harmless requests that may be stopped.")
]
ReadPictures = Annotated[
    bool,
    typer.Option("--read-pictures", help="Also read text in pictures (needs the extra 'ocr')."),
]
Quick = Annotated[
    bool, typer.Option("--quick", help="Try fewer prompts: takes half the time, finds less.")
]
KeptStates = Annotated[
    Path | None,
    typer.Option(
        "--states", help="Folder that keeps recorded states: an interrupted run goes on there."
    ),
]
Precision = Annotated[
    MatmulPrecision,
    typer.Option(
        "--matmul-precision",
        help="Of float32 products while fitting: lower is faster on some processors.",
    ),
]
Refusals = Annotated[
    str,
    typer.Option(
        "--refusals", help="How refusals are recognised: phrases[:FILE], tokens or a judge."
    ),
]
JudgeName = Annotated[str, typer.Option(help="Judge: phrases, llama-guard:NAME, ...")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Do not report progress on stderr.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def loads_models(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each field of ``LoadOptions``, in place of its parameter
    ``options``."""

    @wraps(command)
    def with_options(**given: Any) -> None:
        chosen = {field.name: given.pop(field.name) for field in fields(LoadOptions)}
        command(**given, options=LoadOptions(**chosen))

    parameters: list[inspect.Parameter] = []
    for own in inspect.signature(command, eval_str=True).parameters.values():
        parameters += _load_options() if own.name == "options" else [own]
    # typer reads both.
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {one.name: one.annotation for one in parameters}
    return with_options


def _load_options() -> Iterator[inspect.Parameter]:
    types = get_type_hints(LoadOptions)
    for field in fields(LoadOptions):
        flag = [f"--{field.name.replace('_', '-')}"] if types[field.name] is bool else []
        option = typer.Option(*flag, help=field.metadata["help"])
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=Annotated[types[field.name], option],
        )


def load_model(model: str, options: LoadOptions, progress: Any) -> Any:
    """Load a model; an embedded one by its name."""
    from vlm_safeguard.embedded.assemble import resolve
    from vlm_safeguard.model import loading

    name = resolve(model, progress.say)
    progress.say(f"loading {model}")
    return loading.load(name, **options.given())


def read_guard(folder: str | Path, pictures: bool = True) -> Guard:
    """Read a guard, and check that it can be used before a model is loaded for it.

    Args:
        pictures: whether pictures will come. Without them OCR is not needed.

    Raises:
        SafeguardError: it cannot be read, or the OCR library that it needs is missing.
    """
    from vlm_safeguard.data.ocr import check_installed
    from vlm_safeguard.guard import Guard, reads_pictures

    guard = Guard.from_pretrained(folder)
    if pictures and reads_pictures(guard):
        check_installed()
    return guard


def guard_or_default(model: str, guard: str | None) -> str:
    """The name of the guard of a command: by default the one that ships for an embedded model.

    Raises:
        SafeguardError: another model comes without one, or none ships for an embedded model.
    """
    if guard is not None:
        return guard
    from vlm_safeguard.embedded.assemble import MODELS, guard_folder

    if model not in MODELS:
        raise SafeguardError(
            "name a guard with --guard; `vlm-safeguard calibrate MODEL -o guard/` makes one"
        )
    guard_folder(model)
    return model


@contextmanager
def extra_needed(
    what: str = "evaluating",
    extra: str = "eval",
    modules: Collection[str] = ("inspect_ai", "httpx", "tenacity"),
) -> Iterator[None]:
    """Around imports that need an extra; by default those of the harness and of judges.

    ``modules`` are what the extra brings; empty: a module that is missing is always of the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if modules and error.name not in modules:
            raise
        raise SafeguardError(
            f"{what} needs {error.name}: pip install 'vlm-safeguard[{extra}]'"
        ) from error


def ray_workers(engine: str, workers: int) -> int:
    """The number of Ray's workers; 0 for another engine.

    Raises:
        SafeguardError: several were asked for, of another engine.
    """
    if workers > 1 and engine != "ray":
        raise SafeguardError("--workers is for --engine ray: leave it out, or choose that engine")
    return workers if engine == "ray" else 0


def make_progress(quiet: bool) -> Any:
    """Progress on stderr, and none of transformers' own."""
    from transformers.utils import logging

    from vlm_safeguard.utils.progress import Progress

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return Progress(quiet)


def check_folder(folder: Path) -> list[Path]:
    """``files.check_writable``, before long work whose result goes there.

    Raises:
        SafeguardError: it cannot be made or written.
    """
    try:
        return check_writable(folder)
    except OSError as error:
        raise SafeguardError(f"cannot write to {folder}: {error.strerror}") from error


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    json.dump(value, sys.stdout, indent=1, allow_nan=False)
    print()
