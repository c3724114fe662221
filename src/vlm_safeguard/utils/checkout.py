"""Asks git about the checkout that this package is run from."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

HERE = Path(__file__)


def commit() -> str | None:
    """The checkout's commit, with ``+`` where it was changed since; None outside a checkout."""
    return git("describe", "--always", "--abbrev=10", "--dirty=+", "--exclude=*")


def git(*words: str) -> str | None:
    """What git says of this package's checkout; None where it knows nothing."""
    return _said(*words) if _is_ours() else None


@cache
def _is_ours() -> bool:
    """Whether git keeps this file. Installed into an environment inside another project's
    checkout, the package is no part of that project."""
    return _said("ls-files", "--error-unmatch", HERE.name) is not None


def _said(*words: str) -> str | None:
    try:
        found = subprocess.run(
            ["git", *words], cwd=HERE.parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
