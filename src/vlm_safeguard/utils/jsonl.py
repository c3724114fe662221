"""Reads JSON and JSONL strictly; errors name the file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm_safeguard.errors import DataError
from vlm_safeguard.utils.files import read_limited

MAX_BYTES = 64 << 20


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: The file, UTF-8.
        what: What it holds, for the messages ("results").

    Raises:
        DataError: the file is missing, too large, or holds no JSON object.
    """
    try:
        found = json.loads(read_limited(path, MAX_BYTES).decode("utf-8"))
    except OSError as error:
        raise DataError(f"cannot read the {what} {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is broken JSON ({error})") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} is not a JSON object: it should hold {what}")
    return found


def read_rows(path: Path, what: str, keys: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of every line that is not blank.

    Args:
        path: The file, UTF-8, one JSON object a line.
        what: What it holds, for the messages ("labelled responses").
        keys: Keys every object must have.

    Raises:
        DataError: the file is missing, no UTF-8 text or empty, a line is no JSON object, or a key
            is missing.
    """
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read the {what} {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        place = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {place}: not UTF-8 text: {what} are JSONL") from error
    count = 0
    # Not splitlines(): JSON strings may hold U+2028 and other line ends of Unicode as they are.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: broken JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: not a JSON object")
        missing = [key for key in keys if key not in row]
        if missing:
            raise DataError(f"{path}, line {number}: no {', '.join(map(repr, missing))}")
        count += 1
        yield number, row
    if not count:
        raise DataError(f"{path} is empty: it should hold {what}, one JSON object a line")


def text_of(row: dict[str, Any], key: str, where: str) -> str:
    """The string at ``key``.

    Raises:
        DataError: it is not a string.
    """
    value = row[key]
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is not a string")
    return value
