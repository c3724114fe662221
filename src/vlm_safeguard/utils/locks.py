"""Locks a file or folder for one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


@contextmanager
def held_in_turn(lock: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """As ``held``, but waits for another process that holds ``lock``; ``waiting`` is called first.

    Raises:
        OSError: it cannot be written.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    file = FileLock(lock)
    try:
        file.acquire(blocking=False)
    except Timeout:
        waiting()
        file.acquire()
    try:
        yield
    finally:
        file.release()
