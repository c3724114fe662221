"""Reads and writes the files of a guard in a folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from vlm_safeguard.artifact.model_card import CARD_FILE, MARK
from vlm_safeguard.errors import GuardError
from vlm_safeguard.utils.files import read_limited, write_whole

_MAX_CARD = 1 << 20  # bytes of a README that is looked through for our mark


class GuardFolder:
    """Reads a guard's files from a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str, limit: int) -> bytes:
        """The contents of a file of at most ``limit`` bytes.

        Raises:
            GuardError: it is missing, cannot be read, or is larger.
        """
        try:
            return read_limited(self.folder / name, limit)
        except FileNotFoundError as error:
            raise GuardError(
                f"not a guard folder: {name} is missing. Make one with `vlm-safeguard calibrate "
                "MODEL -o GUARD`; one on the hub is loaded by Guard.from_pretrained('owner/name')"
            ) from error
        except OSError as error:
            raise GuardError(f"{name} cannot be read: {error.strerror}") from error


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a guard's files, by name, into ``folder``, which is made if it is missing.

    A card that somebody has edited is kept.

    Raises:
        GuardError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kept = set() if _may_write_card(folder / CARD_FILE) else {CARD_FILE}
        write_whole({folder / name: data for name, data in files.items() if name not in kept})
    except OSError as error:
        reason = error.strerror or error
        raise GuardError(f"cannot write the guard to {folder}: {reason}") from error


def expanded(name: str) -> Path:
    """A path with ``~`` as the home folder, where that is known."""
    try:
        return Path(name).expanduser()
    except RuntimeError:  # ~ of somebody unknown
        return Path(name)


def _may_write_card(path: Path) -> bool:
    """Whether ``path`` does not exist or is a generated card that nobody has edited."""
    if not os.path.lexists(path):
        return True
    try:
        return MARK.encode() in read_limited(path, _MAX_CARD)
    except OSError:
        return False
