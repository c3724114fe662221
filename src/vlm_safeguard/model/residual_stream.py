"""Finds and verifies the language decoder of a VLM, and hooks its residual stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import ModelOutput

from vlm_safeguard.errors import ModelError
from vlm_safeguard.model.text_only import text_pass
from vlm_safeguard.model.weights import input_device


@dataclass(frozen=True)
class Decoder:
    """The verified language decoder of a VLM.

    Attributes:
        path: its name inside the model.
        skipped: layers that a request without a picture skips, because they attend to the picture
            only. The residual stream bypasses them unchanged.
        whole: whether every layer puts out the states of all tokens, and none its last ones alone;
            known of a verified decoder.
    """

    module: nn.Module
    layers: nn.ModuleList
    path: str
    hidden_size: int
    skipped: frozenset[int] = frozenset()
    whole: bool = True


def find_decoder(model: Any) -> Decoder:
    """Find the language decoder and check it against the configuration.

    The decoder is the one module that holds the token embedding and as many layers as the text
    configuration says, inside what ``get_decoder()`` returns. All of these are needed:
    ``get_decoder()`` may return the model itself or a wrapper, and a list of layers alone may be
    the vision tower's.

    Raises:
        ModelError: the model cannot be guarded, or its decoder cannot be verified.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_decoder"):
        raise ModelError(
            f"{name} is not a transformers model with a decoder: pass what vlm_safeguard.load or "
            "AutoModelForImageTextToText.from_pretrained returns"
        )
    try:
        text = config.get_text_config(decoder=True)
    except ValueError as error:  # several text configurations
        raise ModelError(f"cannot verify the decoder of {name}: {error}") from error
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} is an encoder-decoder model, and a guard needs a language model that reads "
            "prompt and answer in one decoder"
        )
    if getattr(type(model), "generate", None) is not GenerationMixin.generate:
        raise ModelError(
            f"{name} has its own generate(), which bypasses the forward pass that a guard "
            "hooks, so it cannot be guarded. If it wraps a model (for example an adapter), attach "
            "the guard to the inner model"
        )
    depth = getattr(text, "num_hidden_layers", None)
    embedding, pointed = model.get_input_embeddings(), model.get_decoder()
    found = [
        (path, module, layers)
        for path, module in model.named_modules()
        for layers in module.children()
        if isinstance(layers, nn.ModuleList) and len(layers) == depth
        if _holds(module, embedding) and _holds(pointed, module)
    ]
    if len(found) != 1:
        raise ModelError(
            f"cannot verify the decoder of {name}: where get_decoder() points, {len(found)} "
            f"modules hold the token embedding and {depth} layers, as the text configuration says"
        )
    path, module, layers = found[0]
    skipped = frozenset(getattr(text, "cross_attention_layers", None) or ())
    return Decoder(module, layers, path, text.hidden_size, skipped)


def _holds(module: nn.Module, part: nn.Module | None) -> bool:
    return any(inner is part for inner in module.modules())


def hidden_of(output: Any) -> Tensor:
    """The residual stream (B, T, d) in a decoder layer's output: the tensor itself, or the first of
    a tuple.

    Raises:
        ModelError: the output holds no residual stream.
    """
    if isinstance(output, Tensor):  # first: this runs at every layer of every step
        hidden = output
    else:
        hidden = output[0] if isinstance(output, (tuple, list, ModelOutput)) and output else output
    if not isinstance(hidden, Tensor) or hidden.ndim != 3 or not hidden.is_floating_point():
        found = (
            f"{hidden.dtype} of shape {tuple(hidden.shape)}"
            if isinstance(hidden, Tensor)
            else type(hidden).__name__
        )
        raise ModelError(
            f"a decoder layer outputs {found}, not a floating-point residual stream (batch, "
            "tokens, hidden size) that a guard could read and steer"
        )
    return hidden


def replace_hidden(output: Any, hidden: Tensor) -> Tensor | tuple:
    """A decoder layer's output with ``hidden`` as its residual stream."""
    return hidden if isinstance(output, Tensor) else (hidden, *output[1:])


class EnoughSeen(Exception):
    """Ends a forward pass early. A layer's watcher raises it if no higher layer is needed, and the
    caller of the pass suppresses it."""


def watch_layer(decoder: Decoder, layer: int, see: Callable[[Any], Tensor | None]) -> Any:
    """Hook the residual stream (B, T, d) after a decoder layer.

    If a request without a picture skips the layer, the hook is at the input of the next layer that
    always runs. So ``see`` is called once in every pass. Watch layers in ascending order.

    Args:
        decoder: the verified decoder.
        layer: number of the layer.
        see: called with the layer's output, which ``hidden_of`` takes the stream from. The tensor
            it returns replaces the stream; None changes nothing.

    Returns:
        A handle whose ``remove()`` removes the hook.

    Raises:
        ModelError: the layer may be skipped, and no layer above it always runs.
    """
    if layer not in decoder.skipped:

        def after(_: nn.Module, __: Any, output: Any) -> Any:
            changed = see(output)
            return None if changed is None else replace_hidden(output, changed)

        return decoder.layers[layer].register_forward_hook(after)
    following = [n for n in range(layer + 1, len(decoder.layers)) if n not in decoder.skipped]
    if not following:
        raise ModelError(f"layer {layer} is skipped without a picture, and no layer follows it")

    def before(_: nn.Module, args: tuple, kwargs: dict) -> Any:
        if args:
            changed = see(args[0])
            return None if changed is None else ((changed, *args[1:]), kwargs)
        changed = see(kwargs.get("hidden_states"))
        return None if changed is None else (args, kwargs | {"hidden_states": changed})

    return decoder.layers[following[0]].register_forward_pre_hook(before, with_kwargs=True)


@contextmanager
def watching(
    decoder: Decoder, layers: Iterable[int], see: Callable[[int, Any], None]
) -> Iterator[None]:
    """Hook the residual stream after several layers, in ascending order, inside the ``with`` block.

    Args:
        see: called with the number of a layer and its output, see ``watch_layer``.
    """
    handles = []
    try:
        for layer in layers:
            handles.append(watch_layer(decoder, layer, partial(see, layer)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def verify_residual_stream(model: Any) -> Decoder:
    """Find the decoder and test it on a few text tokens.

    The output of each layer must be the input of the next one, also when the output is replaced;
    the next one may take its last columns alone, as Gemma 4 does where layers share their keys.
    Otherwise, a guard would not read and steer what the model computes with.

    Returns:
        The verified decoder.

    Raises:
        ModelError: the decoder is not found, or its layers do not share one residual stream.
    """
    decoder = find_decoder(model)
    name, depth = type(model).__name__, len(decoder.layers)
    ids = _plain_ids(model)
    taken: dict[int, Tensor] = {}
    left: dict[int, Tensor] = {}
    order: list[int] = []

    def take(layer: int) -> Any:
        def hook(_: Any, args: tuple, kwargs: dict) -> None:
            order.append(layer)
            taken[layer] = hidden_of(args[0] if args else kwargs.get("hidden_states"))

        return hook

    def leave(layer: int) -> Any:
        def hook(_: Any, __: Any, output: Any) -> Any:
            hidden = hidden_of(output)
            kept = hidden.shape[1]  # a layer may put out the last columns alone
            if hidden.shape != (1, kept, decoder.hidden_size) or not 0 < kept <= ids.shape[1]:
                raise ModelError(
                    f"layer {layer} puts out a state of shape {tuple(hidden.shape)} for "
                    f"{ids.shape[1]} tokens, no residual stream of {decoder.hidden_size}"
                )
            left[layer] = -hidden  # another stream, no larger
            return replace_hidden(output, left[layer])

        return hook

    handles = []
    for layer, module in enumerate(decoder.layers):
        handles.append(module.register_forward_pre_hook(take(layer), with_kwargs=True))
        handles.append(module.register_forward_hook(leave(layer)))
    try:
        text_pass(model, ids, torch.ones_like(ids))
    except ModelError as error:
        raise ModelError(f"cannot verify the decoder of {name}: {error}") from error
    except (ValueError, TypeError) as error:  # of the model: it wants other inputs
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ModelError(
            f"cannot verify the decoder of {name}: it does not run on text alone ({reason})"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    ran = [layer for layer in range(depth) if layer not in decoder.skipped]
    if order != ran:
        raise ModelError(
            f"cannot verify the decoder of {name}: of layers {ran} a text-only pass ran {order}"
        )
    for layer, following in pairwise(ran):
        entered = taken[following].to(left[layer].device)
        if not entered.shape[1] or not torch.equal(left[layer][:, -entered.shape[1] :], entered):
            raise ModelError(
                f"cannot verify the decoder of {name}: what layer {layer} puts out is not what "
                f"layer {following} takes in, so there is no residual stream to steer"
            )
    return replace(decoder, whole=all(out.shape[1] == ids.shape[1] for out in left.values()))


def _plain_ids(model: Any) -> Tensor:
    """Five token ids (1, 5) that the configuration does not mention, so not special tokens."""
    embedding = model.get_input_embeddings()
    taken = {
        value
        for config in (model.config, model.config.get_text_config(decoder=True))
        for value in config.to_dict().values()
        if isinstance(value, int)
    }
    free = [token for token in range(embedding.weight.shape[0]) if token not in taken][:5]
    return torch.tensor([free], device=input_device(model))
