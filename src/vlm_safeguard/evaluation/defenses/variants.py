"""Copies of a guard with other settings, for comparisons and experiments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlm_safeguard.artifact.config import Gate, GuardConfig, Steering
from vlm_safeguard.guard import Guard


def paper_formula(base_guard: Guard, alpha: float) -> Guard:
    """The paper's plain formula on the same directions: b = 0 per layer, ``add``, own pass.

    A baseline for comparisons: one direction, every prompt and generated position.
    """
    config = base_guard.config
    layers = config.steering.layers
    steering = Steering(
        mode="add", query="pass", positions="all", layers=layers, rank=1, alpha=alpha
    )
    tensors = {}
    for layer in layers:
        tensors[f"directions.{layer}"] = base_guard.tensors[f"directions.{layer}"][:1].contiguous()
        tensors[f"anchor.{layer}"] = base_guard.tensors[f"anchor.{layer}"][:1].contiguous()
    tensors["gate.0"] = torch.cat([tensors[f"directions.{n}"] for n in layers])
    gate = Gate(source="vlm", layers=layers, thresholds=[0.0] * len(layers), per_layer=True)
    return changed(base_guard, tensors, steering=steering, gates=[gate], reads_pictures=False)


def changed(guard: Guard, tensors: Mapping[str, Tensor] | None = None, **settings: Any) -> Guard:
    """The same guard with other settings (fields of ``GuardConfig``), validated."""
    fields = {name: getattr(guard.config, name) for name in type(guard.config).model_fields}
    config = GuardConfig.model_validate({**fields, **settings})
    return Guard(config, dict(guard.tensors if tensors is None else tensors))


def with_steering(guard: Guard, **changes: Any) -> Guard:
    """The same guard with other steering settings, for experiments (rank may only shrink)."""
    steering = Steering.model_validate(guard.config.steering.model_dump() | changes)
    tensors = {k: v for k, v in guard.tensors.items() if k.startswith("gate.")}
    for layer in steering.layers:
        for kind in ("directions", "anchor"):
            name = f"{kind}.{layer}"
            tensors[name] = guard.tensors[name][: steering.rank].contiguous()
    return changed(guard, tensors, steering=steering)
