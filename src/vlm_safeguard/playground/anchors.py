"""The calibration anchors on two principal axes of their hidden states."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vlm_safeguard.data.prompts import ANCHORS, anchors, digests
from vlm_safeguard.embedded.assemble import default_cache
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.recording import anchor_queries, record
from vlm_safeguard.utils.files import read_limited, write_whole
from vlm_safeguard.utils.progress import Progress

_MAX_BYTES = 1 << 28


@dataclass(frozen=True)
class AnchorMap:
    """Two principal axes of the anchors' states.

    Attributes:
        layer: the states are those after this layer.
        points: (2, N, 2): harmful anchors, then their harmless partners.
        shares: the part of the variance that each axis explains.
        mean, axes: (d,) and (2, d), of the projection.
    """

    layer: int
    points: Tensor
    shares: tuple[float, float]
    mean: Tensor
    axes: Tensor

    @classmethod
    def of(cls, states: Tensor, layer: int) -> AnchorMap:
        """The map of ``states`` (2, N, d). Harmful anchors lie further right on average."""
        flat = states.double().flatten(0, 1)
        mean = flat.mean(0)
        _, values, right = torch.linalg.svd(flat - mean, full_matrices=False)
        axes = right[:2]
        points = ((flat - mean) @ axes.T).unflatten(0, states.shape[:2])
        if points[0, :, 0].mean() < points[1, :, 0].mean():
            axes, points = axes * torch.tensor([[-1.0], [1.0]]), points * torch.tensor([-1.0, 1.0])
        first, second = (values[:2] ** 2 / (values**2).sum()).tolist()
        return cls(layer, points, (first, second), mean, axes)

    def place(self, state: Tensor) -> tuple[float, float]:
        """Where a state (d,) falls."""
        x, y = ((state.double() - self.mean) @ self.axes.T).tolist()
        return x, y


def anchor_map(loaded: LoadedModel, guard: Guard, layer: int, progress: Progress) -> AnchorMap:
    """Record the anchors as text after ``layer``, or take their states from the user's cache.

    Raises:
        ModelError: the states cannot be recorded.
    """
    path = default_cache() / "playground" / f"{_key(loaded, guard, layer)}.safetensors"
    pairs = anchors()
    shape = (2, len(pairs), guard.config.model.hidden_size)
    states = _cached(path, shape)
    if states is None:
        with tempfile.TemporaryDirectory() as folder:
            queries = anchor_queries(pairs)
            found = record(
                loaded, queries, Path(folder), what="anchors", layers=layer + 1, progress=progress
            )
            states = found[:, layer].clone().view(shape)
        _keep(path, states, progress)
    return AnchorMap.of(states, layer)


def _key(loaded: LoadedModel, guard: Guard, layer: int) -> str:
    """Names the guard (its digest stands in its configuration), the anchors and the layer."""
    parts = (guard.config.model_dump_json(), digests()[ANCHORS], str(loaded.model.dtype), layer)
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]


def _cached(path: Path, shape: tuple[int, ...]) -> Tensor | None:
    try:
        states = load(read_limited(path, _MAX_BYTES)).get("states")
    except (OSError, SafetensorError):  # missing or damaged: recorded again
        return None
    return states if states is not None and states.shape == shape else None


def _keep(path: Path, states: Tensor, progress: Progress) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole({path: save({"states": states.contiguous()})})
    except OSError as error:
        progress.say(f"the anchors' states are not kept: {error.strerror or error}")
