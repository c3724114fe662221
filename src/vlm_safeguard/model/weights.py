"""Reads a model's weights on devices, offloaded or quantised, and computes their digest."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vlm_safeguard.errors import ModelError


def stored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model's weights with a label, in order.

    These are the parameters, once each, and the buffers of the checkpoint, in which some kinds of
    quantisation keep weights. A quantised parameter is returned in parts, and their labels say how
    it was quantised.

    Raises:
        ModelError: a weight is missing or is not a tensor.
    """
    own: dict[str, Any] = dict(model.named_parameters())
    # A weight in two places is one parameter, but two where it is offloaded.
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    own = {n: p for n, p in own.items() if not (p.is_meta and tied.get(n) in own)}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    kept = {name: part for name, part in model.state_dict().items() if name not in parameters}
    for name, part in sorted((own | kept).items()):
        if not isinstance(part, Tensor) or part.is_quantized:
            raise ModelError(
                f"{type(model).__name__} has packed weights ({name}), which a guard cannot "
                "identify: quantise with torchao, or load the model unquantised"
            )
        yield from _parts(name, (_fetched(model, name) if part.is_meta else part).detach())


def adapter_names(model: nn.Module) -> set[str]:
    """Names of the adapters (PEFT) on a model or on a part of it.

    It runs at the start of every request, so it uses a flat loop, which takes a third of the time
    of ``model.modules()``.
    """
    modules, seen = [model], {model}
    for module in modules:  # grows on the way
        for part in module._modules.values():
            if part is not None and part not in seen:
                seen.add(part)
                modules.append(part)
    known = (module.__dict__.get("peft_config") or () for module in modules)
    return {name for names in known for name in names}


def adapters_at_work(model: nn.Module) -> Iterator[str]:
    """For each module with adapters, the active ones in order, with their scales.

    ``stored`` contains the weights of inactive adapters too, so it does not show which are active.
    """
    names = adapter_names(model)
    for place, module in model.named_modules() if names else ():
        disabled = getattr(module, "disable_adapters", None)
        if isinstance(disabled, bool):  # a layer's; a whole model has a method of that name
            active = [] if disabled else [n for n in module.active_adapters if n in names]
            own = module.__dict__.get("scaling")  # not that of a module that it wraps
            scales = own if isinstance(own, dict) else {}
            told = [(name, float(scales[name]) if name in scales else None) for name in active]
            yield f"{place} {told}"


def weights_digest(model: Any) -> str:
    """SHA-256 of a sample of every parameter.

    The sample is 64 values of each parameter, spread over it and rounded to bfloat16: cheap enough
    for every attach, and any training changes some of them. The vision tower and the projector are
    included, because the gate in the VLM depends on them. So are adapters, which of them are
    active, and their scales. The digest is the same in float32 and bfloat16 and for offloaded
    weights, but differs for quantised ones.

    Raises:
        ModelError: a weight is missing or cannot be read (see ``stored``).
    """
    digest = hashlib.sha256()
    for label, weight in stored(model):
        flat = weight.flatten()
        step = max(1, flat.numel() // 64)
        values = flat[::step][:64].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(label.encode() + bytes(values.numpy().tobytes()))
    for place in adapters_at_work(model):
        digest.update(f"\0adapters {place}".encode())
    return digest.hexdigest()


def quantised(weight: Tensor) -> bool:
    """Whether a weight is quantised."""
    return is_traceable_wrapper_subclass(weight) or not weight.is_floating_point()


def input_device(model: Any) -> torch.device:
    """The device of the model's inputs, also if the embedding is offloaded."""
    embedding = model.get_input_embeddings()
    if not embedding.weight.is_meta:
        return embedding.weight.device
    places = [getattr(hook, "execution_device", None) for hook in _hooks(embedding)]
    place = next((place for place in places if place is not None), "cpu")
    return torch.device(place)


def _parts(label: str, values: Tensor) -> Iterator[tuple[str, Tensor]]:
    if not is_traceable_wrapper_subclass(values):
        yield label, values
        return
    names, how = values.__tensor_flatten__()
    told = re.sub(" at 0x[0-9a-f]+", "", repr(how))  # no addresses: they differ from run to run
    for name in names:
        yield from _parts(f"{label} {type(values).__name__} {told} {name}", getattr(values, name))


def _fetched(model: nn.Module, name: str) -> Tensor:
    """The values of an offloaded weight, from the accelerate hook of its module or of a module
    around it."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, -1, -1):
        for hook in _hooks(model.get_submodule(".".join(parts[:cut]))):
            try:
                return (getattr(hook, "weights_map", None) or {})[".".join(parts[cut:])]
            except KeyError:
                continue
    raise ModelError(
        f"{type(model).__name__} has no weights at {name} (device meta), and nothing that loads "
        "them: load the model with its weights"
    )


def _hooks(module: nn.Module) -> list[Any]:
    """The accelerate hooks on a module."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))
