"""The command line, run as a user runs it: in this process, or in one of its own."""

from __future__ import annotations

import contextlib
import io
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vlm_safeguard.cli import main


def run(
    *arguments: object, cwd: Path, program: Callable[[], object] = main
) -> subprocess.CompletedProcess[str]:
    """In this process, where everything is imported already. An exception that a user would see
    as a traceback comes out of here."""
    out, err = io.StringIO(), io.StringIO()
    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["vlm-safeguard", *map(str, arguments)])
        try:
            with pytest.raises(SystemExit) as ended:
                program()
        finally:
            signal.signal(signal.SIGTERM, before)
    code = int(ended.value.code or 0)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def run_apart(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which starts from nothing."""
    command = [sys.executable, "-m", "vlm_safeguard", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)
