"""Reads text, CSV and JSON tables; errors name the file, the place and what to do."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_safeguard.errors import DataError
from vlm_safeguard.utils.files import read_utf8


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that hold something.

    Raises:
        DataError: as ``read_utf8``, or no line holds anything.
    """
    # Not splitlines(): a form feed or a Unicode line separator inside a prompt ends no line.
    lines = [line.strip() for line in read_utf8(path, "the prompts").split("\n")]
    return _some(path, list(filter(None, lines)))


def read_csv(
    path: Path, columns: Sequence[str], optional: Sequence[str] = ()
) -> list[dict[str, str]]:
    """The rows of a CSV file with a header: of each, the ``columns`` and ``optional`` cells.

    Args:
        columns: columns that must be there and hold something in every row; the case of their
            names does not matter, for copies of a benchmark differ in it.
        optional: columns that must be there and may hold nothing.

    Raises:
        DataError: as ``read_utf8``, or a column is missing, a cell is empty, a row has too many
            or too few cells, or there is no row.
    """
    wanted = [*columns, *optional]
    reader = csv.reader(
        io.StringIO(read_utf8(path, "the table", newline=""), newline=""), strict=True
    )
    rows: list[dict[str, str]] = []
    try:
        header = [name.strip().casefold() for name in next(reader, [])]
        if not header:
            raise DataError(f"{path} is empty; download it again")
        if missing := [name for name in wanted if name.casefold() not in header]:
            raise DataError(_columns(str(path), header, wanted, missing))
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if not cells:
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{where}: {len(cells)} cells where the header names {len(header)}; "
                    "download the file again"
                )
            named = dict(zip(header, cells, strict=True))
            row = {name: named[name.casefold()].strip() for name in wanted}
            if empty := [name for name in columns if not row[name]]:
                raise DataError(f"{where}: nothing in {', '.join(empty)}; correct the file")
            rows.append(row)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: broken CSV ({error})") from error
    return _some(path, rows)


def read_json(path: Path) -> Any:
    """A JSON file, in which no object names the same thing twice.

    Raises:
        DataError: as ``read_utf8``, or the JSON is broken (with its line) or repeats a name.
    """
    return _parse(read_utf8(path, "the table"), path, first_line=1)


def read_jsonl(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a file with one JSON object a line: of each, the ``columns``.

    Raises:
        DataError: as ``read_json`` and ``fields``, or there is no row.
    """
    rows = [
        fields(_parse(line, path, first_line=n), columns, f"{path}, line {n}")
        for n, line in enumerate(read_utf8(path, "the table").split("\n"), start=1)
        if line.strip()
    ]
    return _some(path, rows)


def fields(row: Any, columns: Sequence[str], where: str) -> dict[str, str]:
    """The ``columns`` of a JSON object as text.

    Raises:
        DataError: it is not an object, or a column is missing, empty, or neither text nor a number.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: an object with {', '.join(columns)} is expected")
    if missing := [name for name in columns if name not in row]:
        raise DataError(_columns(where, list(row), columns, missing))
    found = {name: row[name] for name in columns}
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
            raise DataError(f"{where}: {name} is empty; correct the file")
    return {name: str(value).strip() for name, value in found.items()}


def _columns(where: str, found: Sequence[str], wanted: Sequence[str], missing: list[str]) -> str:
    return (
        f"{where}: no column {', '.join(missing)}: wanted {', '.join(wanted)}, "
        f"found {', '.join(map(str, found)) or 'none'}; is it the publisher's file?"
    )


def _some(path: Path, rows: list[Any]) -> list[Any]:
    if not rows:
        raise DataError(f"{path} has no prompts; download it again")
    return rows


def _parse(text: str, path: Path, first_line: int) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # Python's reader keeps the last of two equal names, and a prompt would vanish unseen.
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f'{path}: an object names "{twice}" twice; correct the file')
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(
            f"{path}, line {line}: broken JSON ({error.msg}); download the file again"
        ) from error
    except RecursionError as error:
        raise DataError(f"{path}: JSON nested too deep to be the publisher's file") from error
