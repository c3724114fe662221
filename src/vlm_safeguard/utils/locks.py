"""Locks a file or folder for one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from vlm_safeguard.errors import SafeguardError


@contextmanager
def held(lock: Path, busy: str) -> Iterator[None]:
    """Hold the file ``lock`` for this process; it is let go with the process, however it ends.

    Raises:
        SafeguardError: another process holds it (says ``busy``), or it cannot be written.
    """
    file = FileLock(lock, blocking=False)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file.acquire()
    except Timeout as error:
        raise SafeguardError(busy) from error
    except OSError as error:
        raise SafeguardError(f"cannot write to {lock.parent}: {error.strerror}") from error
    try:
        yield
    finally:
        file.release()
