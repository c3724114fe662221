"""The package's own three sets, which need no folder, and a file of the user's own prompts."""

from __future__ import annotations

from pathlib import Path

from vlm_safeguard.data import prompts
from vlm_safeguard.data.prompts import Prompt
from vlm_safeguard.errors import DataError
from vlm_safeguard.evaluation.benchmarks.folders import Folder

# Their ids stay as they are in the package's data, without the benchmark's name: which drawing a
# prompt is shown with follows from its id, and results are compared by it.


def malicious(_: Folder) -> list[Prompt]:
    """Plain requests, 100 of each label."""
    return prompts.evaluation("malicious")


def jailbreak(_: Folder) -> list[Prompt]:
    """Questions inside jailbreak templates, 100 of each label."""
    return prompts.evaluation("jailbreak")


def picture(_: Folder) -> list[Prompt]:
    """Requests that need their picture, 100 of each label."""
    return prompts.evaluation("picture")


def file(path: Path) -> list[Prompt]:
    """Harmful requests, one a line: the format of MaliciousInstruct.

    Raises:
        DataError: the file is missing, no UTF-8 text, or holds no prompt.
    """
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except OSError as error:
        raise DataError(f"cannot read the prompts {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a UTF-8 text file of prompts, one a line") from error
    found = [line for line in lines if line]
    if not found:
        raise DataError(f"{path} holds no prompt")
    keys = [f"{path.stem}-{n:04}" for n in range(len(found))]
    return [
        Prompt(key, text, "harmful", "plain", "", key)
        for key, text in zip(keys, found, strict=True)
    ]
