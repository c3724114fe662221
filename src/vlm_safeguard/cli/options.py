"""Options and helpers shared by all commands: loading, progress, printing."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.utils.files import check_writable

Model = Annotated[str, typer.Argument(help="Folder, hub name, or 'embedded'.")]
Dtype = Annotated[str, typer.Option(help="Model dtype: float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="Device to run the model on, for example cpu or cuda.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, max=4096)]
FalsePositives = Annotated[
    float, typer.Option(min=0.001, max=0.5, help="Share of harmless requests that may be stopped.")
]
JudgeName = Annotated[str, typer.Option(help="Judge: phrases, llama-guard:NAME, ...")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Do not report progress on stderr.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def load_model(model: str, dtype: str, device: str, progress: Any) -> Any:
    """Load a model; an embedded one by its name."""
    from vlm_safeguard.embedded.assemble import resolve
    from vlm_safeguard.model import loading

    name = resolve(model, progress.say)
    progress.say(f"loading {model}")
    return loading.load(name, dtype, device)


@contextmanager
def extra_needed() -> Iterator[None]:
    """Around the import of the harness or of judges: what they need is an extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("inspect_ai", "httpx", "tenacity"):
            raise
        raise SafeguardError(
            f"evaluating needs {error.name}: pip install 'vlm-safeguard[eval]'"
        ) from error


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
