"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def check_writable(folder: Path) -> None:
    """Make ``folder`` and try it out, before long work whose result goes there.

    Raises:
        OSError: it cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def write_whole(files: dict[Path, bytes]) -> None:
    """Bring every file to the disk under a temporary name, and only then put all in place."""
    staged: dict[str, Path] = {}
    try:
        for path, data in files.items():
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
            staged[temporary] = path
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            Path(temporary).chmod(0o644)
        for temporary, path in staged.items():
            Path(temporary).replace(path)
    finally:
        for temporary in staged:
            Path(temporary).unlink(missing_ok=True)
