"""Reads published safety benchmarks from a folder, in their publishers' file formats.

Nothing of them is in the package: the user fetches a benchmark from its publisher, under the
publisher's terms, and names the folder; or has ``published`` fetch one of the paper's three.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from vlm_safeguard.data.prompts import Prompt
from vlm_safeguard.data.sampling import thin
from vlm_safeguard.errors import DataError
from vlm_safeguard.evaluation.benchmarks import own, pictured, text  # noqa: F401 (they register)
from vlm_safeguard.evaluation.benchmarks.folders import Folder
from vlm_safeguard.evaluation.benchmarks.registry import BENCHMARKS, WORDS, Benchmark

__all__ = ["BENCHMARKS", "PROMPTS", "Benchmark", "benchmark_of", "load_benchmark"]

PROMPTS = "prompts:"  # and a file: a benchmark of the user's own


def benchmark_of(name: str) -> Benchmark:
    """The benchmark called ``name``.

    Raises:
        DataError: there is none.
    """
    if name.startswith(PROMPTS):
        path = Path(name.removeprefix(PROMPTS))
        return Benchmark(name, path.name, "", WORDS, lambda _: own.file(path))
    if name not in BENCHMARKS:
        raise DataError(f"no benchmark {name}; there are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def load_benchmark(name: str, folder: Path | None = None, limit: int | None = None) -> list[Prompt]:
    """The prompts of a benchmark, with stable ids that no other benchmark uses.

    Args:
        name: one of ``BENCHMARKS``, or ``prompts:FILE`` (see ``own.file``).
        folder: where the publisher's files lie: directly, in a sub-folder called ``name``, or as
            in a clone of the publisher's repository. The package's own sets need none.
        limit: at most that many prompts of each label, spread evenly (see ``thin``). The whole
            benchmark is read and checked even so.

    Returns:
        The prompts in the publisher's order. A picture is named by its file, which is there but
        has not been opened.

    Raises:
        DataError: no such benchmark, a bad limit, or a folder or file that is missing, empty,
            not UTF-8, broken, without the wanted columns, or uses an id twice.
    """
    benchmark = benchmark_of(name)
    if limit is not None and limit < 1:
        raise DataError(f"a limit of {limit} leaves nothing of {name}; give 1 or more, or none")
    prompts = benchmark.read(Folder(name, _root(benchmark, folder), benchmark.publisher))
    repeated = [key for key, times in Counter(p.id for p in prompts).items() if times > 1]
    if repeated:
        raise DataError(
            f"{name}: the id {repeated[0]} is used twice; correct the files, "
            f"or get them from {benchmark.publisher}"
        )
    return prompts if limit is None else thin(prompts, limit)


def _root(benchmark: Benchmark, folder: Path | None) -> Path:
    if not benchmark.files:
        return Path()
    wanted = f"{benchmark.title} wants {' and '.join(benchmark.files)} from {benchmark.publisher}"
    if folder is None:
        raise DataError(f"{wanted}: name the folder that holds them")
    if not folder.is_dir():
        raise DataError(f"{wanted}: there is no folder {folder}")
    inner = folder / benchmark.name
    return inner if inner.is_dir() else folder
