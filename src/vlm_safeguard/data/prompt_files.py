"""Reads prompts and anchors of one's own from JSONL, CSV or text."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_safeguard.errors import DataError
from vlm_safeguard.utils.files import read_limited

MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class PromptRow:
    """A prompt of a file. ``question`` names what it asks, where the file does."""

    prompt: str
    picture: str = ""
    question: str = ""


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file, and the SHA-256 of its bytes."""

    rows: list[PromptRow]
    sha256: str


def read_prompts(path: Path) -> PromptFile:
    """The prompts of ``.jsonl`` (objects) or ``.csv`` (with a header), which have a ``prompt`` and
    may have a ``picture`` and a ``question``; of any other file, one prompt on each line.

    Raises:
        DataError: the file cannot be read, or a row has no prompt. The message names the line.
    """
    data = _bytes(path)
    rows = [
        PromptRow(*(_text(row, key, where) for key in ("prompt", "picture", "question")))
        for where, row in _table(path, data, ("prompt",))
    ]
    return PromptFile(rows, hashlib.sha256(data).hexdigest())


def read_pairs(path: Path) -> tuple[list[tuple[str, str]], str]:
    """The pairs of ``.jsonl`` or ``.csv`` with ``harmful`` and ``harmless``, and the file's digest.

    Raises:
        DataError: the file cannot be read or is of another kind, or a row lacks one of them.
    """
    if path.suffix.lower() not in (".jsonl", ".csv"):
        raise DataError(
            f"{path} should hold pairs: use a .jsonl or .csv file with harmful and harmless"
        )
    data = _bytes(path)
    pairs = [
        (_text(row, "harmful", where), _text(row, "harmless", where))
        for where, row in _table(path, data, ("harmful", "harmless"))
    ]
    return pairs, hashlib.sha256(data).hexdigest()


def _bytes(path: Path) -> bytes:
    try:
        return read_limited(path, MAX_BYTES)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _table(path: Path, data: bytes, needed: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a file, each with where it stands; all have what is ``needed``."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: convert it") from error
    kind = path.suffix.lower()
    rows: list[tuple[int, Any]] = []
    try:
        if kind == ".csv":
            reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
            for row in reader:
                rows.append((reader.line_num, row))
        else:
            # Not splitlines(): a line separator of Unicode inside a prompt ends no line.
            lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
            as_json = kind == ".jsonl"
            for number, line in lines:
                rows.append((number, json.loads(line) if as_json else {"prompt": line.strip()}))
    except (csv.Error, ValueError, RecursionError) as error:
        read = rows[-1][0] if rows else 0
        raise DataError(f"{path} is not a {kind} file, after line {read}: {error}") from error
    for number, row in rows:
        missing = [key for key in needed if not isinstance(row, dict) or not row.get(key)]
        if missing:
            raise DataError(f"{path}, line {number}: there is no {missing[0]!r}")
    if not rows:
        raise DataError(f"{path} is empty")
    return [(f"{path}, line {number}", row) for number, row in rows]


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key) or ""
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is not a text")
    return value.strip()
