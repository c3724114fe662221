"""The audit log: one JSON line for each request, with digests in place of what was said.

An answer is complete only when its line is written: if the disk is full, the request fails.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.utils.files import drop_torn_line


class AuditLog:
    """Appends to a file and rotates it by size.

    Args:
        path: the file. Older ones are ``path.1``, ``path.2`` and so on.
        content: also keep what was asked and answered.
        max_bytes: size at which a new file begins.
        keep: number of older files.
    """

    def __init__(
        self, path: Path, content: bool = False, max_bytes: int = 50_000_000, keep: int = 10
    ) -> None:
        self.path, self.content = path, content
        self._max_bytes, self._keep = max_bytes, keep
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _open(path).close()
            drop_torn_line(path)
        except OSError as error:
            raise SafeguardError(f"cannot write the audit log {path}: {error.strerror}") from error

    def write(self, entry: dict[str, Any]) -> None:
        """Append one entry. Raises OSError if it cannot be written whole."""
        line = json.dumps(entry, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        with self._lock:
            if self.path.exists() and self.path.stat().st_size + len(line) > self._max_bytes:
                self._rotate()
            with _open(self.path) as file:
                size = file.seek(0, os.SEEK_END)
                if file.write(line) != len(line):
                    file.truncate(size)  # the next line must not follow half of this one
                    raise OSError("the line was cut short")

    def _rotate(self) -> None:
        for number in range(self._keep - 1, 0, -1):
            older = self._numbered(number)
            if older.exists():
                older.replace(self._numbered(number + 1))
        self.path.replace(self._numbered(1))

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")


def _open(path: Path) -> FileIO:
    """To append. Only the owner may read a log that is made here: it may hold what was said."""
    return FileIO(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab")


def digest(data: str | bytes) -> str:
    """SHA-256 of a text or of bytes, in hexadecimal."""
    return hashlib.sha256(
        data if isinstance(data, bytes) else data.encode("utf-8", "replace")
    ).hexdigest()


def entries(path: Path) -> Iterator[dict[str, Any]]:
    """Entries of a log and its older files, oldest first. A torn last line is left out.

    Raises:
        SafeguardError: there is no such file, or a line is not an entry.
    """
    if not path.is_file():
        raise SafeguardError(f"no audit log at {path}")
    older = [one for one in path.parent.glob(f"{path.name}.*") if one.suffix[1:].isdigit()]
    older.sort(key=lambda one: -int(one.suffix[1:]))
    for file in [*older, path]:
        lines = file.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1], 1):
            try:
                entry = json.loads(line)
            except ValueError:
                entry = None
            if not isinstance(entry, dict):
                raise SafeguardError(f"{file}:{number}: not an entry of an audit log")
            yield entry


def summarise(found: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Counts over the entries of a log."""
    outcomes: Counter[str] = Counter()
    modes: Counter[str] = Counter()
    gates: Counter[str] = Counter()
    total = fired = pictures = tokens = 0
    first = last = None
    for entry in found:
        total += 1
        first, last = first or entry.get("time"), entry.get("time")
        outcomes[str(entry.get("outcome"))] += 1
        modes[str(entry.get("mode"))] += 1
        fired += bool(entry.get("fired"))
        gates.update(entry.get("gates") or ())
        pictures += entry.get("pictures") or 0
        tokens += entry.get("completion_tokens") or 0
    return {
        "requests": total,
        "from": first,
        "to": last,
        "outcomes": dict(outcomes),
        "modes": dict(modes),
        "gate_opened": fired,
        "gates": dict(gates),
        "pictures": pictures,
        "completion_tokens": tokens,
    }
