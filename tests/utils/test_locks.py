"""A lock that is waited for, with another process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from vlm_safeguard.utils.locks import held_in_turn

HOLDER = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_is_waited_for_until_its_holder_is_killed(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    command = [sys.executable, "-c", HOLDER, str(lock)]
    waited: list[bool] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"

        def waiting() -> None:
            waited.append(holder.poll() is None)
            holder.kill()

        with held_in_turn(lock, waiting):
            assert waited == [True]
    with held_in_turn(lock, waiting):
        assert waited == [True]


def test_the_folder_of_a_lock_is_made(tmp_path: Path) -> None:
    with held_in_turn(tmp_path / "a" / "b" / "lock", lambda: None):
        assert (tmp_path / "a" / "b").is_dir()
