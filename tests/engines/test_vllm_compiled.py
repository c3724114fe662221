"""Runs the tests of a compiled model: two engines in one process disturb each other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")


def test_the_guard_is_in_compiled_models(tmp_path: Path) -> None:
    # With VLLM_CPU_CI_ENV vLLM only traces; its cache could hold models of other runs.
    environment = {key: value for key, value in os.environ.items() if key != "VLLM_CPU_CI_ENV"}
    environment |= {"VLLM_CACHE_ROOT": str(tmp_path), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, "-m", "pytest", str(Path(__file__).with_name("compiled.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "3 passed" in done.stdout
