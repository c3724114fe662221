"""Recorded verdicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.judges.responses import HELP, LOOP, PAIRS, QUESTION, REFUSAL
from tests.evaluation.recorded import write_recorded
from vlm_safeguard.errors import DataError
from vlm_safeguard.evaluation.judges import (
    Judgement,
    make_judge,
)
from vlm_safeguard.evaluation.judges.recorded import RecordedJudge


def test_recorded_verdicts_are_replayed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "verdicts.jsonl"
    pairs = [*[(QUESTION, text) for text in (HELP, REFUSAL, LOOP, "", "\ud800 odd")], PAIRS[0]]
    said = [*make_judge("phrases").judge(pairs[:-1]), Judgement(None, "the judge was away", "?")]
    write_recorded(path, make_judge("phrases"), pairs, said)
    judge = make_judge(f"recorded:{path}")
    assert (judge.name, judge.asks) == ("recorded phrases", "refusal")
    assert judge.judge(pairs[::-1]) == said[::-1]
    (missing,) = judge.judge([(QUESTION + " ", HELP)])
    assert missing.verdict is None and "no recorded verdict" in missing.reason
    assert HELP not in path.read_text()  # hashes, no words


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": "fine"}, "line 2: unknown verdict 'fine'"),
        ({"verdict": "complied", "response_sha256": "b"}, "different verdict"),
        ({"judge": "other"}, "mixes verdicts of j .harm., other"),
        ({"asks": "all"}, "'asks'"),
        ({"verdict": None, "reason": ""}, "without a reason"),
        ({"raw": 3}, "'raw' is not a string"),
    ],
)
def test_a_broken_recording_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    row = {"prompt_sha256": "a", "response_sha256": "b", "verdict": "refused", "reason": "r"}
    row |= {"raw": "", "judge": "j", "asks": "harm"}
    path = tmp_path / "verdicts.jsonl"
    lines = [row, row | {"response_sha256": "c"} | change]
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError, match=message):
        RecordedJudge(path)
