"""Runs tests whose engine needs a process of its own: two in one process disturb each other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")


@pytest.mark.parametrize(("file", "tests"), [("compiled.py", 3), ("ranks.py", 2)])
def test_an_engine_of_another_kind_is_guarded(tmp_path: Path, file: str, tests: int) -> None:
    # With VLLM_CPU_CI_ENV vLLM only traces; its cache could hold models of other runs.
    environment = {key: value for key, value in os.environ.items() if key != "VLLM_CPU_CI_ENV"}
    environment |= {"VLLM_CACHE_ROOT": str(tmp_path), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, "-m", "pytest", str(Path(__file__).with_name(file))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"{tests} passed" in done.stdout
