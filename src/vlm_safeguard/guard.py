"""The guard artifact: ``guard.json`` (settings, provenance, results) + ``guard.safetensors``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from vlm_safeguard.errors import GuardError
from vlm_safeguard.files import write_whole
from vlm_safeguard.models import config_digest, find_decoder, weights_digest
from vlm_safeguard.session import Session
from vlm_safeguard.settings import SCHEMA_VERSION, GuardConfig
from vlm_safeguard.witness import ImageMarkup

CONFIG_FILE, TENSOR_FILE = "guard.json", "guard.safetensors"
MAX_JSON, MAX_TENSORS = 4 << 20, 2 << 30  # bytes; far above any real guard


class Guard:
    """A calibrated guard.

    ``tensors`` hold, in float32: ``directions.{l}`` (m, d) and ``anchor.{l}`` (m,), the harmful
    anchors' mean coordinates, for each steered layer; ``gate.{i}`` (n, d), the vectors of gate i.
    """

    def __init__(self, config: GuardConfig, tensors: dict[str, Tensor]) -> None:
        self.config = config
        self.tensors = tensors
        self._check_shapes()

    def _check_shapes(self) -> None:
        model, steering = self.config.model, self.config.steering
        expected: dict[str, tuple[int, ...]] = {}
        for layer in steering.layers:
            expected[f"directions.{layer}"] = (steering.rank, model.hidden_size)
            expected[f"anchor.{layer}"] = (steering.rank,)
        for index, gate in enumerate(self.config.gates):
            expected[f"gate.{index}"] = (len(gate.layers), model.hidden_size)
        found = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        if found != expected:
            wrong = sorted(set(found.items()) ^ set(expected.items()))
            raise GuardError(f"the guard's tensors do not fit its settings: {wrong[:3]}")
        used = [*steering.layers, *(n for gate in self.config.gates for n in gate.layers)]
        if any(not 0 <= layer < model.layers for layer in used):
            raise GuardError(f"the guard names layers outside 0..{model.layers - 1}")
        for name, tensor in self.tensors.items():
            if tensor.dtype != torch.float32 or not torch.isfinite(tensor).all():
                raise GuardError(f"the guard's tensor {name} is not finite float32")
        for layer in steering.layers:
            rows = self.tensors[f"directions.{layer}"].double()
            if (rows @ rows.T - torch.eye(len(rows))).abs().max() > 1e-3:
                raise GuardError(f"the directions of layer {layer} are not orthonormal")

    # -- files ---------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write both files; each appears whole or not at all, and a torn pair is detected.

        Raises:
            GuardError: mode ``erase`` (an ablation that weakens the model), a calibration record
                with NaN or Inf, or a disk error.
        """
        if self.config.steering.mode == "erase":
            raise GuardError(
                "`erase` alone removes refusals: it is an ablation for experiments and is never "
                "saved as a guard"
            )
        target = Path(folder)
        blob = save_tensors({k: v.contiguous() for k, v in self.tensors.items()})
        config = self.config.model_copy(update={"tensors_sha256": hashlib.sha256(blob).hexdigest()})
        try:
            text = json.dumps(config.model_dump(), indent=1, allow_nan=False) + "\n"
        except ValueError as error:
            raise GuardError("the guard's settings or record hold NaN or Inf") from error
        try:
            target.mkdir(parents=True, exist_ok=True)
            write_whole({target / TENSOR_FILE: blob, target / CONFIG_FILE: text.encode()})
        except OSError as error:
            reason = error.strerror or error
            raise GuardError(f"cannot write the guard to {target}: {reason}") from error
        self.config = config

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Guard:
        """Read a guard and check it whole: schema, digest, shapes, finiteness.

        Raises:
            GuardError: missing, torn, tampered with, or of another schema version.
        """
        source = Path(folder)
        try:
            text = _read_limited(source / CONFIG_FILE, MAX_JSON)
            blob = _read_limited(source / TENSOR_FILE, MAX_TENSORS)
            raw = json.loads(text)
        except FileNotFoundError as error:
            raise GuardError(
                f"{source} is no guard: {Path(error.filename).name} is missing. Make one with "
                "`vlm-safeguard calibrate MODEL -o GUARD`"
            ) from error
        except OSError as error:
            raise GuardError(f"cannot read the guard {source}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise GuardError(f"{source / CONFIG_FILE} is not valid JSON: calibrate anew") from error
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if version != SCHEMA_VERSION:
            raise GuardError(
                f"{source} has guard schema {version!r}, this version reads {SCHEMA_VERSION}: "
                "calibrate anew or install the version that wrote it"
            )
        try:
            config = GuardConfig.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise GuardError(f"{source / CONFIG_FILE}: {place}: {first['msg']}") from error
        if hashlib.sha256(blob).hexdigest() != config.tensors_sha256:
            raise GuardError(
                f"{source / TENSOR_FILE} does not match the digest in {CONFIG_FILE}: the guard "
                "is torn or was changed. Calibrate anew"
            )
        if config.steering.mode == "erase":
            raise GuardError(f"{source}: `erase` is an ablation and cannot be loaded as a guard")
        try:
            tensors = load_tensors(blob)
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise GuardError(f"{source / TENSOR_FILE} is damaged: calibrate anew") from error
        return cls(config, tensors)

    # -- use -----------------------------------------------------------------------------------

    @property
    def image_markup(self) -> ImageMarkup:
        markup = self.config.markup
        return ImageMarkup(tuple(markup.token_ids), tuple(markup.before), tuple(markup.after))

    def check_model(self, model: Any) -> None:
        """Refuse a model this guard was not calibrated on.

        Raises:
            GuardError: the size, configuration or weights differ.
        """
        decoder, own = find_decoder(model), self.config.model
        if (decoder.hidden_size, len(decoder.layers)) != (own.hidden_size, own.layers):
            raise GuardError(
                f"this guard is for {own.name} ({own.layers} layers of {own.hidden_size}), the "
                f"model has {len(decoder.layers)} layers of {decoder.hidden_size}"
            )
        if config_digest(model) != own.config_sha256:
            raise GuardError(f"this guard is for {own.name}: the model's configuration differs")
        if weights_digest(model) != own.weights_sha256:
            raise GuardError(
                f"this guard is for {own.name}: the model's weights differ. A guard belongs to "
                "the weights it was calibrated on; run `vlm-safeguard calibrate` on these"
            )

    @contextmanager
    def attach(self, model: Any) -> Iterator[Session]:
        """Guard every ``generate`` and forward call of ``model`` inside the ``with`` block.

        The model is left as it was afterwards, also after an exception.

        Raises:
            GuardError: the guard belongs to another model, or one is attached already.
        """
        self.check_model(model)
        session = Session(self.config, self.tensors, self.image_markup, model)
        session.arm()
        try:
            yield session
        finally:
            session.disarm()


def _read_limited(path: Path, limit: int) -> bytes:
    if path.stat().st_size > limit:
        raise GuardError(f"{path} is larger than any guard ({limit} bytes at most)")
    return path.read_bytes()
