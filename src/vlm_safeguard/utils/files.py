"""Writes files atomically and reads files with a size limit."""

from __future__ import annotations

import errno
import io
import os
import stat
import tempfile
from pathlib import Path

from vlm_safeguard.errors import DataError


def check_writable(folder: Path) -> list[Path]:
    """Make ``folder`` and try it out, before long work whose result goes there.

    Returns:
        The folders that were made for it, from itself up.

    Raises:
        OSError: it cannot be made or written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
    return made


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


def drop_torn_line(path: Path) -> None:
    """Cut off a last line that a crash left without its end."""
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


def read_utf8(path: Path, what: str, newline: str | None = None) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Args:
        path: the file.
        what: what it holds, for the message ("the prompts").
        newline: as for ``open``.

    Raises:
        DataError: it cannot be read or is not UTF-8.
    """
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as stream:
            return stream.read()
    except OSError as error:
        raise DataError(f"cannot read {what} {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: not UTF-8 text: convert it, or get it again"
        ) from error


def read_limited(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most ``limit`` bytes; never waits on a pipe or a device.

    Links are followed, because the cache of the hub consists of them, as far as they lead to a
    regular file.

    Raises:
        FileNotFoundError: there is nothing under this name.
        OSError: anything else; ``strerror`` says what, without the file's name.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise OSError(errno.ELOOP, "it is a broken link", str(path)) from None
        raise
    except ValueError as error:  # a zero byte in the name
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    _check_regular(mode, path)
    # What was looked at may have been replaced since: look again at what was opened.
    with io.BufferedReader(io.FileIO(path, opener=_open_at_once)) as stream:
        state = os.fstat(stream.fileno())
        _check_regular(state.st_mode, path)
        data = stream.read(limit + 1) if state.st_size <= limit else b""
    if state.st_size > limit or len(data) > limit:
        raise OSError(errno.EFBIG, f"it is larger than the {limit} bytes allowed", str(path))
    return data


def _open_at_once(path: str, flags: int) -> int:
    """Open a pipe without waiting for its other end."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check_regular(mode: int, path: Path) -> None:
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, "it is a folder, not a file", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a pipe, socket or device, not a file", str(path))
