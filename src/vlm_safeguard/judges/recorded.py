"""Verdicts recorded once and replayed: the same judgement again without the judge.

One JSON object a line, with the SHA-256 of prompt and response in place of their words, so that a
recording can be published without them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from vlm_safeguard.errors import DataError
from vlm_safeguard.evaluate.rows import read_rows, text_of
from vlm_safeguard.files import write_whole
from vlm_safeguard.judges.base import Asks, Judge, Judgement, Pair, Verdict, unscored

KEYS = ("prompt_sha256", "response_sha256", "verdict", "reason", "raw", "judge", "asks")


def digest(text: str) -> str:
    """SHA-256 of a prompt or response, lone surrogates included."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def write_recorded(
    path: Path, judge: Judge, pairs: Sequence[Pair], judgements: Sequence[Judgement]
) -> None:
    """Write what ``judge`` said of ``pairs``, the whole file or nothing. Unscored ones too.

    Raises:
        ValueError: there is not one judgement for each pair.
        OSError: the file cannot be written.
    """
    lines = {}
    for (prompt, response), found in zip(pairs, judgements, strict=True):
        values = (
            digest(prompt),
            digest(response),
            found.verdict,
            found.reason,
            found.raw,
            judge.name,
            judge.asks,
        )
        lines[values[:2]] = json.dumps(dict(zip(KEYS, values, strict=True)))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole({path: "".join(line + "\n" for line in lines.values()).encode()})


class RecordedJudge:
    """Replays a recording; a pair that is not in it is unscored.

    The text check is not run again: what was recorded is what is said.

    Raises:
        DataError: the file is missing or broken, holds an unknown verdict, two verdicts on one
            pair, or verdicts of two judges.
    """

    def __init__(self, path: Path) -> None:
        self._found: dict[tuple[str, str], Judgement] = {}
        judges: set[tuple[str, Asks]] = set()
        for number, row in read_rows(path, "recorded verdicts", KEYS):
            where = f"{path}, line {number}"
            verdict, asks = row["verdict"], row["asks"]
            if verdict not in (*get_args(Verdict), None):
                raise DataError(f"{where}: unknown verdict {verdict!r}")
            if asks not in get_args(Asks):
                raise DataError(f"{where}: 'asks' must be one of {', '.join(get_args(Asks))}")
            reason, raw = text_of(row, "reason", where), text_of(row, "raw", where)
            if verdict is None and not reason:
                raise DataError(f"{where}: unscored without a reason")
            key = (text_of(row, "prompt_sha256", where), text_of(row, "response_sha256", where))
            found = Judgement(verdict, reason, raw)
            if self._found.setdefault(key, found).verdict != verdict:
                raise DataError(f"{where}: a second, different verdict on the same pair")
            judges.add((text_of(row, "judge", where), asks))
        if len(judges) > 1:
            names = ", ".join(sorted(f"{name} ({asks})" for name, asks in judges))
            raise DataError(f"{path} mixes verdicts of {names}: record each in a file of its own")
        recorded, self.asks = judges.pop()
        self.name = f"recorded {recorded}"

    def judge(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """The recorded judgement of each (prompt, response)."""
        missing = unscored("no recorded verdict for this prompt and response")
        return [self._found.get((digest(p), digest(r)), missing) for p, r in pairs]
