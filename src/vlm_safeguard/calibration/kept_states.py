"""Keeps recorded states on the disk, for a calibration that was interrupted."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlm_safeguard.data.inputs import Query
from vlm_safeguard.errors import CalibrationError
from vlm_safeguard.model.fingerprint import config_digest, dtype_name, template_digest
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.weights import weights_digest
from vlm_safeguard.utils.locks import held
from vlm_safeguard.utils.matmul import MatmulPrecision

# States (n, L, d), and what was read in the logits, (n, ...).
Found = tuple[Tensor, Tensor | None]


@contextmanager
def states_folder(
    states: Path | None, loaded: LoadedModel, matmul_precision: MatmulPrecision = "highest"
) -> Iterator[Path]:
    """The folder for the states of this model, inside ``states``; without it, one that is deleted.

    Raises:
        SafeguardError: another process is at work there, or it cannot be written.
    """
    if states is None:
        with tempfile.TemporaryDirectory(
            prefix="vlm-safeguard-", ignore_cleanup_errors=True
        ) as temporary:
            yield Path(temporary)
        return
    facts = [
        config_digest(loaded.model),
        weights_digest(loaded.model),
        template_digest(loaded.processor),
        dtype_name(loaded.model),
        matmul_precision,
        version("vlm-safeguard"),
    ]
    folder = states / hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    busy = f"another calibration is at work in {states}: wait for it or name another folder"
    with held(folder / "lock", busy):
        yield folder


def once(
    folder: Path,
    asked: Sequence[Query],
    facts: Sequence[object],
    record: Callable[[Path], Found],
) -> Found:
    """What ``record`` records of the requests, or what it recorded before in ``folder``.

    Args:
        asked: the requests.
        facts: what else the recording depends on.
        record: takes a folder for files that are deleted afterwards.

    Raises:
        CalibrationError: the states cannot be written, or are damaged.
    """
    path = folder / f"{_name(asked, facts)}.safetensors"
    if not path.is_file():
        with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as temporary:
            states, read = record(Path(temporary))
            new = Path(temporary) / path.name
            try:
                save_file({"states": states} | ({} if read is None else {"read": read}), new)
                new.replace(path)
            except (OSError, SafetensorError) as error:  # the latter wraps the former
                raise CalibrationError(f"cannot keep states in {folder}: {error}") from error
    try:
        found = load_file(path)  # mapped into memory, not read
    except (OSError, SafetensorError) as error:
        raise CalibrationError(f"{path} is damaged: delete it ({error})") from error
    return found["states"], found.get("read")


def _name(asked: Sequence[Query], facts: Sequence[object]) -> str:
    """Differs wherever requests or facts do."""
    digest = hashlib.sha256(repr(facts).encode())
    for one in asked:
        image = one.image
        shape = None if image is None else (image.mode, image.size)
        digest.update(repr((one.text, shape)).encode())
        digest.update(b"" if image is None else image.tobytes())
    return digest.hexdigest()[:32]
