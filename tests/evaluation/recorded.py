"""Write what a judge said as a recording, for tests that replay it."""

from collections.abc import Sequence
from pathlib import Path

from vlm_safeguard.evaluation.judges.judgement import Judge, Judgement, Pair
from vlm_safeguard.evaluation.judges.recorded import Recording


def write_recorded(
    path: Path, judge: Judge, pairs: Sequence[Pair], judgements: Sequence[Judgement]
) -> None:
    """Write what ``judge`` said of ``pairs``."""
    recording = Recording(judge.name, judge.asks)
    for pair, found in zip(pairs, judgements, strict=True):
        recording.put(pair, found)
    recording.write(path)
