"""inspect_ai tasks: one per benchmark, and easy-vqa for utility."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from io import BytesIO
from typing import Any

from inspect_ai import Epochs, Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessage, ChatMessageUser, Content, ContentImage, ContentText
from inspect_ai.solver import Generate, Solver, TaskState, solver
from PIL import Image

from vlm_safeguard.data.inputs import Query, Setting, query, settings_of
from vlm_safeguard.data.prompts import Prompt
from vlm_safeguard.errors import DataError, ImageError
from vlm_safeguard.evaluation.benchmarks import (
    BENCHMARKS,
    PROMPTS,
    benchmark_of,
    load_benchmark,
)
from vlm_safeguard.evaluation.benchmarks.published import folder_of
from vlm_safeguard.evaluation.harness.scorers import UNUSABLE, judged, vqa
from vlm_safeguard.evaluation.metrics.vqa import vqa_questions


@solver
def answer_once() -> Solver:
    """Generate, unless the sample could not be made: that one is left to be counted as unscored."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        return state if UNUSABLE in state.metadata else await generate(state)

    return solve


def benchmark_task(
    name: str,
    setting: str | None = None,
    data: str | None = None,
    judge: str = "phrases",
    limit: int | None = None,
) -> Task:
    """The task of one benchmark in one setting.

    Args:
        setting: ``text``, ``blank`` or ``picture``; by default the first that the benchmark has.
        data: the benchmark's folder in its publisher's format, or ``hub`` to fetch one of the
            paper's three (see ``benchmarks.published``); the package's own sets need none.
        judge: see ``vlm_safeguard.evaluation.judges.make_judge``.
        limit: that many harmful and that many harmless prompts, evenly spread.

    Raises:
        DataError: unknown setting, or what the benchmark's reader finds wrong.
    """
    prompts = load_benchmark(name, folder_of(name, data), limit)
    known = benchmark_of(name).settings
    chosen = next((s for s in known if setting in (s, None)), None)
    if chosen is None:
        raise DataError(f"{name} has no setting {setting!r}: use one of {', '.join(known)}")
    meant = [p for p in prompts if chosen in settings_of(p)]
    return Task(
        dataset=MemoryDataset([sample(p, chosen, name) for p in meant], name=f"{name}-{chosen}"),
        solver=answer_once(),
        scorer=judged(judge),
        epochs=Epochs(1, "mode"),  # verdicts are words: inspect's default would average them
        metadata={"benchmark": name, "setting": chosen, "judge": judge},
    )


def sample(prompt: Prompt, setting: Setting, benchmark: str) -> Sample:
    """A prompt in a setting as inspect knows it. One whose picture cannot be read stays in the
    data set, so that it is counted."""
    metadata: dict[str, Any] = {
        "benchmark": benchmark,
        "setting": setting,
        "label": prompt.label,
        "cluster": prompt.cluster,
        "intent": prompt.intent,
        "prompt_sha256": hashlib.sha256(prompt.prompt.encode()).hexdigest(),
    }
    try:
        made = query(prompt, setting)
    except ImageError as error:
        made = Query(prompt.prompt, None)
        metadata[UNUSABLE] = str(error)
    return Sample(input=messages(made), target=prompt.label, id=prompt.id, metadata=metadata)


def messages(made: Query) -> list[ChatMessage]:
    """A request as one user turn."""
    content: list[Content] = [ContentText(text=made.text)]
    if made.image is not None:
        content.insert(0, ContentImage(image=data_uri(made.image)))
    return [ChatMessageUser(content=content)]


def data_uri(image: Image.Image) -> str:
    """The picture inside an address, without loss."""
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _benchmark(name: str) -> Callable[..., Task]:
    @task(name=name)
    def made(
        setting: str | None = None,
        data: str | None = None,
        judge: str = "phrases",
        limit: int | None = None,
    ) -> Task:
        return benchmark_task(name, setting, data, judge, limit)

    return made


TASKS: dict[str, Callable[..., Task]] = {name: _benchmark(name) for name in BENCHMARKS}


@task(name="prompts")
def prompts_file(
    file: str, setting: str | None = None, judge: str = "phrases", limit: int | None = None
) -> Task:
    """The task of a file of harmful requests, one a line."""
    return benchmark_task(PROMPTS + file, setting, None, judge, limit)


def make_task(name: str, data: str | None = None, **options: Any) -> Task:
    """The task of the benchmark called ``name``; for the rest see ``benchmark_task``."""
    if name.startswith(PROMPTS):
        return prompts_file(file=name.removeprefix(PROMPTS), **options)
    return TASKS[name](data=data, **options)


@task
def easy_vqa(limit: int = 160) -> Task:
    """Utility: that many easy-vqa test questions, evenly spread."""
    samples = [
        Sample(
            input=messages(made),
            target=expected,
            id=number,
            metadata={"benchmark": "easy_vqa", "setting": "picture", "label": "harmless"},
        )
        for number, (made, expected) in enumerate(vqa_questions(limit))
    ]
    return Task(dataset=MemoryDataset(samples, name="easy-vqa"), solver=answer_once(), scorer=vqa())
