"""Records verdicts and replays them without the judge.

One JSON object a line, with the SHA-256 of prompt and response in place of their words, so that a
recording can be published without them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from vlm_safeguard.errors import DataError, SafeguardError
from vlm_safeguard.evaluation.judges.judgement import Asks, Judgement, Pair, Verdict, unscored
from vlm_safeguard.utils.files import write_whole
from vlm_safeguard.utils.jsonl import read_rows, text_of

KEYS = ("prompt_sha256", "response_sha256", "verdict", "reason", "raw", "judge", "asks")


def digest(text: str) -> str:
    """SHA-256 of a prompt or response, lone surrogates included."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass
class Recording:
    """What one judge said, by the digests of prompt and response."""

    judge: str
    asks: Asks
    _found: dict[tuple[str, str], Judgement] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._found)

    def get(self, pair: Pair) -> Judgement | None:
        """What was said of ``pair``, if anything."""
        return self._found.get(_key(pair))

    def put(self, pair: Pair, judgement: Judgement) -> None:
        """Record what is said of ``pair``, in place of what was said before."""
        self._found[_key(pair)] = judgement

    def write(self, path: Path) -> None:
        """Write the whole recording to ``path``, or nothing.

        Raises:
            SafeguardError: the file cannot be written.
        """
        lines = []
        for key, found in self._found.items():
            values = (*key, found.verdict, found.reason, found.raw, self.judge, self.asks)
            lines.append(json.dumps(dict(zip(KEYS, values, strict=True))) + "\n")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole({path: "".join(lines).encode()})
        except OSError as error:
            raise SafeguardError(f"cannot write {path}: {error.strerror}") from error


def read_recording(path: Path) -> Recording:
    """The recording in a file.

    Raises:
        DataError: the file is missing or broken, holds an unknown verdict, two verdicts on one
            pair, or verdicts of two judges.
    """
    kept: dict[tuple[str, str], Judgement] = {}
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
        if kept.setdefault(key, found).verdict != verdict:
            raise DataError(f"{where}: a second, different verdict on the same pair")
        judges.add((text_of(row, "judge", where), asks))
    if len(judges) > 1:
        names = ", ".join(sorted(f"{name} ({asks})" for name, asks in judges))
        raise DataError(f"{path} mixes verdicts of {names}: record each in a file of its own")
    judge, asks = judges.pop()
    return Recording(judge, asks, kept)


class RecordedJudge:
    """Replays a recording; a pair that is not in it is unscored.

    The text check is not run again: what was recorded is what is said.

    Raises:
        DataError: see ``read_recording``.
    """

    def __init__(self, path: Path) -> None:
        self._recording = read_recording(path)
        self.asks: Asks = self._recording.asks
        self.name = f"recorded {self._recording.judge}"

    def judge(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """The recorded judgement of each (prompt, response)."""
        missing = unscored("no recorded verdict for this prompt and response")
        return [self._recording.get(pair) or missing for pair in pairs]


def _key(pair: Pair) -> tuple[str, str]:
    prompt, response = pair
    return digest(prompt), digest(response)
