"""Hooks that others would put on the language model: of two libraries, and a naive one.

Each adds a vector after layers, at every token. The libraries' have no gate; the naive one has the
paper's, and nothing of what makes a guard safe: it belongs to one batch, checks no call, and is
silent when it is taken off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import requires, version
from typing import Any

import torch
from torch import Tensor

from bench.guards import FAR
from vlm_safeguard.model.residual_stream import find_decoder
from vlm_safeguard.model.text_only import positions_of

Vectors = dict[int, Tensor]  # by layer, (d,)
Peer = Callable[[Any, Vectors], AbstractContextManager[None]]


@contextmanager
def steering_vectors(model: Any, vectors: Vectors) -> Iterator[None]:
    from steering_vectors import SteeringVector

    with SteeringVector(layer_activations=dict(vectors)).apply(model):
        yield


@contextmanager
def repeng(model: Any, vectors: Vectors) -> Iterator[None]:
    from repeng import ControlModel

    control = ControlModel(model, list(vectors))
    try:
        control.set_raw_control(dict(vectors))
        yield
    finally:
        control.unwrap()


@contextmanager
def naive(model: Any, vectors: Vectors) -> Iterator[None]:
    """The paper's formula as one would write it down, along one direction."""

    def hook_of(vector: Tensor) -> Callable:
        change = torch.zeros(())
        unit = vector / vector.norm()

        def hook(_: Any, __: Any, hidden: Tensor) -> Tensor:
            nonlocal change
            if hidden.shape[1] > 1:  # the prompt
                score = hidden[:, -1] @ unit
                change = (1e-3 * score * (score > -FAR))[:, None, None] * unit
            return hidden + change

        return hook

    layers = find_decoder(model).layers
    handles = [layers[n].register_forward_hook(hook_of(v)) for n, v in vectors.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


LIBRARIES: dict[str, Peer] = {"steering-vectors": steering_vectors, "repeng": repeng}


def described(name: str) -> str:
    """A library's version, and what of its requirements leaves out the versions used here."""
    beside = {"transformers": version("transformers"), "numpy": version("numpy")}
    asked = [one for one in requires(name) or () if one.split(";")[0].startswith(tuple(beside))]
    versions = ", ".join(f"{other} {own}" for other, own in beside.items())
    return f"{name} {version(name)} (asks for {', '.join(sorted(asked))}), beside {versions}"


@torch.inference_mode()
def check(peer: Peer, model: Any, inputs: dict[str, Tensor], vectors: Vectors) -> None:
    """A library's hooks do what it says, here: the first layer's last token moves by the vector, in
    every row.

    Raises:
        RuntimeError: they do not, so their time would mean nothing.
    """
    layer = min(vectors)
    places = positions_of(inputs["attention_mask"])  # row by row, as `generate` gives them

    def state() -> Tensor:
        seen: list[Tensor] = []
        following = find_decoder(model).layers[layer + 1]
        handle = following.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, -1]))
        try:
            model(**inputs, position_ids=places, use_cache=False, logits_to_keep=1)
        finally:
            handle.remove()
        return seen[0].clone()

    plain = state()
    with peer(model, vectors):
        steered = state()
    if not torch.allclose(steered - plain, vectors[layer].expand_as(plain), atol=1e-3):
        raise RuntimeError(f"{getattr(peer, '__name__', peer)} does not add its vector")
