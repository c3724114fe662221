"""Makes judges from their specs, as given on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_safeguard.evaluation.judges.endpoint import EndpointJudge
from vlm_safeguard.evaluation.judges.guard_models import llama_guard, prompt_file, qwen3guard
from vlm_safeguard.evaluation.judges.judge_options import split
from vlm_safeguard.evaluation.judges.judgement import Judge, JudgeError
from vlm_safeguard.evaluation.judges.phrases import PhraseJudge
from vlm_safeguard.evaluation.judges.recorded import RecordedJudge

SPECS = {
    "phrases": "phrases[:FILE]",
    "recorded": "recorded:FILE",
    "endpoint": "endpoint:URL#MODEL",
    "llama-guard": "llama-guard:NAME",
    "qwen3guard": "qwen3guard:NAME",
    "prompt-file": "prompt-file:NAME#FILE",
}


def make_judge(spec: str) -> Judge:
    """The judge that ``spec`` names, for example ``endpoint:http://localhost:8000/v1#my-model``.

    Args:
        spec: One of the forms in ``SPECS``, with options at its end or none:
            ``...#my-model?timeout=120&key_variable=OPENAI_API_KEY`` (see ``judge_options``).

    Raises:
        JudgeError: the spec is of no known form, an option is not the judge's, or the judge
            cannot be made.
        DataError: its file cannot be read.
    """
    spec, options = split(spec)
    kind, _, rest = spec.partition(":")
    if kind not in SPECS:
        raise JudgeError(f"unknown judge {spec!r}: use one of {', '.join(SPECS.values())}")
    arguments: list[Any] = []
    make: Callable[..., Judge]
    if kind == "phrases":
        make, complete = PhraseJudge, spec != "phrases:"
        arguments = [Path(rest)] if rest else []
    elif kind == "recorded":
        make, arguments, complete = RecordedJudge, [Path(rest)], bool(rest)
    elif kind in ("llama-guard", "qwen3guard"):
        make = llama_guard if kind == "llama-guard" else qwen3guard
        arguments, complete = [rest], bool(rest)
    else:
        left, _, right = rest.partition("#")
        make = EndpointJudge if kind == "endpoint" else prompt_file
        arguments = [left, right if kind == "endpoint" else Path(right)]
        complete = bool(left and right)
    if not complete:
        raise JudgeError(f"the judge {spec!r} is not of the form {SPECS[kind]}")
    return make(*arguments, **options)


def judge_file(spec: str) -> Path | None:
    """The file that a judge's spec names: its recording, phrases or prompt; None for none."""
    kind, _, rest = split(spec)[0].partition(":")
    if kind in ("recorded", "phrases"):
        return Path(rest) if rest else None
    return Path(rest.partition("#")[2]) if kind == "prompt-file" else None
