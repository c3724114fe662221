"""The package's own three sets, which need no folder, and a file of the user's own prompts."""

from __future__ import annotations

from pathlib import Path

from vlm_safeguard.data import prompts
from vlm_safeguard.data.prompts import Prompt
from vlm_safeguard.evaluation.benchmarks.folders import Folder
from vlm_safeguard.evaluation.benchmarks.registry import PICTURES, benchmark
from vlm_safeguard.evaluation.benchmarks.table_files import read_lines

PACKAGE = "shipped with vlm-safeguard"

# Their ids stay as they are in the package's data, without the benchmark's name: which drawing a
# prompt is shown with follows from its id, and results are compared by it.


@benchmark("Malicious requests", PACKAGE)
def own_malicious(_: Folder) -> list[Prompt]:
    """Plain requests, 100 of each label."""
    return prompts.evaluation("malicious")


@benchmark("Jailbreak templates", PACKAGE)
def own_jailbreak(_: Folder) -> list[Prompt]:
    """Questions inside jailbreak templates, 100 of each label."""
    return prompts.evaluation("jailbreak")


@benchmark("Requests about a picture", PACKAGE, settings=PICTURES)
def own_picture(_: Folder) -> list[Prompt]:
    """Requests that need their picture, 100 of each label."""
    return prompts.evaluation("picture")


def file(path: Path) -> list[Prompt]:
    """Harmful requests, one a line: the format of MaliciousInstruct.

    Raises:
        DataError: the file is missing, no UTF-8 text, or holds no prompt.
    """
    found = read_lines(path)
    keys = [f"{path.stem}-{n:04}" for n in range(len(found))]
    return [
        Prompt(key, text, "harmful", "plain", "", key)
        for key, text in zip(keys, found, strict=True)
    ]
