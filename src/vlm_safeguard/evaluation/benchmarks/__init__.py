"""Reads published safety benchmarks from a folder, in their publishers' file formats.

Nothing of them is in the package: the user fetches a benchmark from its publisher, under the
publisher's terms, and names the folder; or has ``published`` fetch one of the paper's three.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlm_safeguard.data.prompts import Prompt
from vlm_safeguard.data.sampling import thin
from vlm_safeguard.errors import DataError
from vlm_safeguard.evaluation.benchmarks import own, pictured, text
from vlm_safeguard.evaluation.benchmarks.folders import Folder

__all__ = ["BENCHMARKS", "PROMPTS", "Benchmark", "benchmark_of", "load_benchmark"]

PROMPTS = "prompts:"  # and a file: a benchmark of the user's own

_Settings = tuple[Literal["text", "blank", "picture"], ...]
_WORDS: _Settings = ("text", "blank", "picture")
_PICTURES: _Settings = ("picture",)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark that can be read.

    Attributes:
        name: what it is called here; the ids of its prompts begin with it (the package's own
            sets keep the ids of their data).
        title: what its publisher calls it.
        publisher: address at which its files are published.
        licence: the publisher's licence, as its repository states it.
        settings: the settings it can be run in (see ``requests``): a set of words alone in all
            of them, a set that needs its pictures only with them.
        read: reads all its prompts.
        files: the files and folders it wants; none for the package's own sets.
    """

    name: str
    title: str
    publisher: str
    licence: str
    settings: _Settings
    read: Callable[[Folder], list[Prompt]]
    files: tuple[str, ...] = ()


_GITHUB = "https://github.com/"
_PACKAGE = "shipped with vlm-safeguard"

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "own_malicious", "Malicious requests", _PACKAGE, "Apache-2.0", _WORDS, own.malicious
        ),
        Benchmark(
            "own_jailbreak", "Jailbreak templates", _PACKAGE, "Apache-2.0", _WORDS, own.jailbreak
        ),
        Benchmark(
            "own_picture",
            "Requests about a picture",
            _PACKAGE,
            "Apache-2.0",
            _PICTURES,
            own.picture,
        ),
        Benchmark(
            "malicious_instruct",
            "MaliciousInstruct",
            _GITHUB + "Princeton-SysML/Jailbreak_LLM",
            "none stated",
            _WORDS,
            text.malicious_instruct,
            ("MaliciousInstruct.txt",),
        ),
        Benchmark(
            "jailbreak_instructions",
            "Jailbreak Instructions",
            _GITHUB + "thu-coai/JailbreakDefense_GoalPriority",
            "none stated",
            _WORDS,
            text.jailbreak_instructions,
            ("harmful_questions.json", "jailbreak_templates.json"),
        ),
        Benchmark(
            "mm_harmful_bench",
            "MM-Harmful Bench",
            _GITHUB + "Jihuai-wpy/InferAligner",
            "Apache-2.0; pictures from the web",
            _PICTURES,
            pictured.mm_harmful_bench,
            ("questions.jsonl", "images"),
        ),
        Benchmark(
            "advbench",
            "AdvBench, harmful behaviours",
            _GITHUB + "llm-attacks/llm-attacks",
            "MIT",
            _WORDS,
            text.advbench,
            ("harmful_behaviors.csv",),
        ),
        Benchmark(
            "jailbreakbench",
            "JailbreakBench, JBB-Behaviors",
            "https://huggingface.co/datasets/JailbreakBench/JBB-Behaviors",
            "MIT",
            _WORDS,
            text.jailbreakbench,
            ("harmful-behaviors.csv", "benign-behaviors.csv"),
        ),
        Benchmark(
            "harmbench",
            "HarmBench, text behaviours",
            _GITHUB + "centerforaisafety/HarmBench",
            "MIT",
            _WORDS,
            text.harmbench,
            ("harmbench_behaviors_text_all.csv",),
        ),
        Benchmark(
            "harmbench_multimodal",
            "HarmBench, multimodal behaviours",
            _GITHUB + "centerforaisafety/HarmBench",
            "MIT",
            _PICTURES,
            pictured.harmbench_multimodal,
            ("harmbench_behaviors_multimodal_all.csv", "multimodal_behavior_images"),
        ),
        Benchmark(
            "strongreject",
            "StrongREJECT",
            _GITHUB + "alexandrasouly/strongreject",
            "MIT",
            _WORDS,
            text.strongreject,
            ("strongreject_dataset.csv",),
        ),
        Benchmark(
            "xstest",
            "XSTest",
            _GITHUB + "paul-rottger/xstest",
            "CC-BY-4.0",
            _WORDS,
            text.xstest,
            ("xstest_prompts.csv",),
        ),
        Benchmark(
            "figstep",
            "FigStep on SafeBench",
            _GITHUB + "ThuCCSLab/FigStep",
            "MIT",
            _PICTURES,
            pictured.figstep,
            ("safebench.csv", "SafeBench"),
        ),
        Benchmark(
            "mm_safetybench",
            "MM-SafetyBench",
            _GITHUB + "isXinLiu/MM-SafetyBench",
            "CC-BY-NC-4.0",
            _PICTURES,
            pictured.mm_safetybench,
            ("processed_questions", "imgs"),
        ),
        Benchmark(
            "mossbench",
            "MOSSBench",
            _GITHUB + "xirui-li/MOSSBench",
            "CC-BY-SA-4.0, not for training",
            _PICTURES,
            pictured.mossbench,
            ("images_information/information.json", "images"),
        ),
    )
}


def benchmark_of(name: str) -> Benchmark:
    """The benchmark called ``name``.

    Raises:
        DataError: there is none.
    """
    if name.startswith(PROMPTS):
        path = Path(name.removeprefix(PROMPTS))
        return Benchmark(name, path.name, "", "", _WORDS, lambda _: own.file(path))
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
