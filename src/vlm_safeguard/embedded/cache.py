"""The folder that embedded VLMs are kept in: one process at a time writes to it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm_safeguard.errors import DemoError
from vlm_safeguard.utils.locks import held_in_turn

Progress = Callable[[str], None]


@contextmanager
def sole_writer(cache: Path, work: str, what: str, progress: Progress) -> Iterator[None]:
    """Do ``work`` ("fetching") on ``what`` while no other process does such work in ``cache``.

    Waits for a process that does. Whatever is named ``.{work}-*`` is temporary: a process that was
    killed left it, and it is removed first.

    Raises:
        DemoError: ``cache`` cannot be locked, or an ``OSError`` came from the work: no room, or no
            right to write.
    """

    def waiting() -> None:
        progress(f"another process is {work} in {cache}: waiting for it")

    try:
        with held_in_turn(cache / f".{work}.lock", waiting):
            for left in cache.glob(f".{work}-*"):
                _remove(left)
            yield
    except OSError as error:
        raise DemoError(
            f"could not write {what} to {cache}: {error.strerror or error}. Make room or set "
            "VLM_SAFEGUARD_CACHE to a folder that can be written"
        ) from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
