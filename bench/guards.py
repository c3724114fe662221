"""Guards made by hand: valid directions that mean nothing, gates forced open or shut.

What a guard costs depends on its shape alone: which layers, how many directions, which tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from vlm_safeguard.artifact.config import Gate, GuardConfig, ImageMarkup, ModelIdentity, Steering
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.fingerprint import config_digest
from vlm_safeguard.model.residual_stream import find_decoder
from vlm_safeguard.model.weights import weights_digest

RANK = 64
FAR = 1e9  # no score comes near it: a gate with this threshold is shut, with its negative open


@dataclass(frozen=True)
class Model:
    """A model to guard, with what its guards have to know of it (the digests take a while)."""

    model: Any
    markup: ImageMarkup
    identity: ModelIdentity

    @property
    def depth(self) -> int:
        return self.identity.layers


def guarded_model(model: Any, markup: ImageMarkup) -> Model:
    decoder = find_decoder(model)
    identity = ModelIdentity(
        name="bench",
        config_sha256=config_digest(model),
        weights_sha256=weights_digest(model),
        template_sha256="",
        hidden_size=decoder.hidden_size,
        layers=len(decoder.layers),
    )
    return Model(model, markup, identity)


def layer_sets(depth: int) -> dict[str, list[int]]:
    """Layers guarded: 1, half, all."""
    return {"1": [depth // 2], "half": list(range(1, depth, 2)), "all": list(range(depth))}


def gate_layers(layers: Sequence[int], depth: int) -> list[int]:
    """Where the gates read: what is guarded in the middle third."""
    return [n for n in layers if depth // 3 <= n <= 2 * depth // 3]


def restoring(
    target: Model,
    layers: list[int],
    *,
    text: bool,
    is_open: bool,
    tokens: int | None = 1,
    signs: bool = False,
) -> Guard:
    """A guard with pooled gates and `restore` of ``RANK`` directions.

    ``text``: there is a gate on the text-only pass beside the one on the request's own, and the
    coordinates come from it; else they are the anchors'. ``signs``: it reads the refusal signs too,
    so the text-only pass goes on to the logits.
    """
    read = gate_layers(layers, target.depth)
    sources: list[Literal["text", "vlm"]] = ["text", "vlm"] if text else ["vlm"]
    steering = Steering(
        mode="restore",
        reference="text" if text else "anchor",
        layers=layers,
        rank=min(RANK, target.identity.hidden_size),
        tokens=tokens,
    )
    gates = [_gate(source, read, is_open) for source in sources]
    if signs:
        said = {"kind": "intent", "openings": [0], "intent_weight": 1.0, "verdict_weight": 1.0}
        gates[0] = gates[0].model_copy(update=said)
    return _guard(target, gates, steering)


def adding(target: Model, layers: list[int]) -> Guard:
    """The paper's formula: each layer's gate, open, and `add` along one direction at every prompt
    and generated token."""
    gate = _gate("vlm", layers, True, per_layer=True)
    steering = Steering(
        mode="add", query="pass", positions="all", layers=layers, rank=1, alpha=1e-3
    )
    return _guard(target, [gate], steering)


def _gate(
    source: Literal["text", "vlm"], layers: list[int], is_open: bool, per_layer: bool = False
) -> Gate:
    thresholds = [-FAR if is_open else FAR] * len(layers)
    return Gate(source=source, layers=layers, thresholds=thresholds, per_layer=per_layer)


def _guard(target: Model, gates: list[Gate], steering: Steering) -> Guard:
    width = target.identity.hidden_size
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in steering.layers:
        columns = torch.randn(width, steering.rank, generator=generator)
        tensors[f"directions.{layer}"] = torch.linalg.qr(columns)[0].T.contiguous()
        tensors[f"anchor.{layer}"] = torch.randn(steering.rank, generator=generator)
    for index, gate in enumerate(gates):
        vectors = torch.randn(len(gate.layers), width, generator=generator)
        tensors[f"gate.{index}"] = vectors / vectors.norm(dim=1, keepdim=True)
    config = GuardConfig(
        model=target.identity, markup=target.markup, gates=gates, steering=steering
    )
    return Guard(config, tensors)
