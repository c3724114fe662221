"""Turns the options of ``calibrate`` into data, budget and refusal recogniser."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vlm_safeguard.cli.options import extra_needed
from vlm_safeguard.data.own_prompts import OwnFiles
from vlm_safeguard.errors import SafeguardError

if TYPE_CHECKING:
    from vlm_safeguard.calibration.recognition import Recogniser


def own_files(
    harmful: Path | None,
    harmless: Path | None,
    anchors: Path | None,
    pictures: Path | None,
    alone: bool,
    data: Path | None,
) -> OwnFiles | None:
    """The files of one's own that were named; None if none was.

    Raises:
        SafeguardError: they do not go together.
    """
    if not (harmful or harmless or anchors or pictures or alone):
        return None
    if data is not None:
        raise SafeguardError("--data is a whole set by itself: leave the other files out")
    if harmful is None or harmless is None:
        missing = "--harmful" if harmful is None else "--harmless"
        raise SafeguardError(
            f"name prompts of both labels: {missing} is missing (a gate learns from the difference)"
        )
    return OwnFiles(harmful, harmless, anchors, pictures, alone)


def recogniser_of(spec: str) -> Recogniser | Literal["tokens"]:
    """How refusals are recognised: ``phrases``, ``phrases:FILE``, ``tokens``, or a judge's spec.

    Raises:
        SafeguardError: the file cannot be read, the judge is unknown, or it tells harm.
    """
    from vlm_safeguard.calibration.recognition import BY_PHRASES, ByJudge, ByPhrases
    from vlm_safeguard.model.refusal_phrases import RefusalPhrases

    kind, _, rest = spec.partition(":")
    if spec == "tokens":
        return "tokens"
    if kind == "phrases":
        return ByPhrases(RefusalPhrases.from_file(Path(rest))) if rest else BY_PHRASES
    with extra_needed():
        from vlm_safeguard.evaluation.judges.factory import SPECS, make_judge
    if kind not in SPECS:
        ways = ["tokens", *SPECS.values()]
        raise SafeguardError(f"--refusals {spec}: use one of {', '.join(sorted(ways))}")
    return ByJudge(make_judge(spec))
