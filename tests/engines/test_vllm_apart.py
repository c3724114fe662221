"""Runs tests whose engine needs a process of its own: two in one process disturb each other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")


def passes(cache: Path, file: str, tests: int, **settings: str) -> None:
    """Run the tests in a file; vLLM keeps compiled models in ``cache``."""
    # With VLLM_CPU_CI_ENV vLLM only traces.
    environment = {key: value for key, value in os.environ.items() if key != "VLLM_CPU_CI_ENV"}
    environment |= {"VLLM_CACHE_ROOT": str(cache), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, "-m", "pytest", str(Path(__file__).with_name(file))]
    done = subprocess.run(command, env=environment | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"{tests} passed" in done.stdout


def test_compiled_models_are_guarded_and_kept_apart_by_their_layers(tmp_path: Path) -> None:
    for layers in ("[0, 1, 2, 3, 4, 5]", "[2, 5]"):
        passes(tmp_path, "compiled.py", 3, LAYERS=layers)


def test_means_over_words_are_those_of_transformers(tmp_path: Path) -> None:
    passes(tmp_path, "means.py", 4)


def test_words_in_pictures_and_verdicts_are_those_of_transformers(tmp_path: Path) -> None:
    passes(tmp_path, "pictures.py", 3)


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="each rank needs a GPU")
def test_each_rank_is_guarded(tmp_path: Path) -> None:
    passes(tmp_path, "ranks.py", 2)
