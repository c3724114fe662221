"""The benchmarks by name. A reader of one registers itself with ``@benchmark``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vlm_safeguard.data.inputs import Setting
from vlm_safeguard.data.prompts import Prompt
from vlm_safeguard.evaluation.benchmarks.folders import Folder

Reader = Callable[[Folder], list[Prompt]]

GITHUB = "https://github.com/"
WORDS: tuple[Setting, ...] = ("text", "blank", "picture")  # a set of words alone
PICTURES: tuple[Setting, ...] = ("picture",)  # a set that needs its own pictures


@dataclass(frozen=True)
class Benchmark:
    """A benchmark that can be read.

    Attributes:
        name: what it is called here; the ids of its prompts begin with it (the package's own
            sets keep the ids of their data).
        title: what its publisher calls it.
        publisher: address at which its files are published.
        settings: the settings it can be run in (see ``data.inputs``).
        read: reads all its prompts.
        files: the files and folders it wants; none for the package's own sets.
    """

    name: str
    title: str
    publisher: str
    settings: tuple[Setting, ...]
    read: Reader
    files: tuple[str, ...] = ()


BENCHMARKS: dict[str, Benchmark] = {}


def benchmark(
    title: str, publisher: str, *files: str, settings: tuple[Setting, ...] = WORDS
) -> Callable[[Reader], Reader]:
    """Registers a reader as a benchmark, which gets the function's name."""

    def register(read: Reader) -> Reader:
        name = read.__name__
        BENCHMARKS[name] = Benchmark(name, title, publisher, settings, read, files)
        return read

    return register
