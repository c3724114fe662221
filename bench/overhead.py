"""What the overhead is made of: a model whose layers do nothing, so that the hooks are all there
is, and the parts of a hook one by one."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import peers
from bench.decoding import Decoding
from bench.guards import RANK, Model, adding, layer_sets, restoring
from bench.timing import Setup, Spread, interleaved, seconds, spread
from vlm_safeguard.evaluation.metrics import paired_timing
from vlm_safeguard.model.residual_stream import find_decoder
from vlm_safeguard.model.weights import weights_digest

STEPS = 40


def per_layer(target: Model, batch: int, rounds: int) -> dict[str, Spread]:
    """Microseconds per layer and decoding step that hooks on every layer take, by what they do.

    The difference of a step with them to the same step of a twin without any, right beside it.
    """
    model, layers = target.model, layer_sets(target.depth)["all"]
    generator = torch.Generator().manual_seed(0)
    width = target.identity.hidden_size
    vectors = {n: torch.randn(width, generator=generator) for n in layers}
    made = partial(restoring, target, layers, text=False)
    setups: dict[str, Setup] = {
        "none": nullcontext,  # how far chance alone goes
        "an empty hook": partial(_hooked, model, lambda *_: None),
        "an empty hook under torch.compiler.disable": partial(
            _hooked, model, torch.compiler.disable(lambda *_: None)
        ),
        "the hook with torch.addmm twice": partial(_hooked, model, _two_products(width, batch)),
        "guard, nothing to do": partial(made(is_open=False).attach, model),
        "guard, dose over": partial(made(is_open=True).attach, model),
        "guard, restoring every token": partial(made(is_open=True, tokens=None).attach, model),
        "guard, adding at every token": partial(adding(target, layers).attach, model),
        "naive hook": partial(peers.naive, model, vectors),
    }
    for name, peer in peers.LIBRARIES.items():
        setups[name] = partial(peer, model, vectors)
    prompt = torch.full((batch, 4), 5)
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}

    with torch.inference_mode(), _idle_layers(model):
        pair = paired_timing.twin(model), model

        def work(_: str) -> float:
            calls = [Decoding(one, inputs) for one in pair]
            for call in calls:
                call.call()
            extra = []
            for step in range(STEPS):
                took = {}
                for which in ((0, 1), (1, 0))[step % 2]:
                    calls[which].prepare(prompt[:, 0])
                    took[which] = seconds(calls[which].call)
                extra.append(took[1] - took[0])
            return 1e6 * statistics.median(extra) / len(layers)

        found = interleaved(setups, work, rounds)
    return {name: spread(figures) for name, figures in found.items()}


def attaching(target: Model, rounds: int) -> dict[str, Spread]:
    """Milliseconds that attaching and taking off a guard take, and its look at the weights."""
    guard = restoring(target, layer_sets(target.depth)["all"], text=False, is_open=False)

    def attach() -> None:
        with guard.attach(target.model):
            pass

    works: dict[str, Callable[[], Any]] = {
        "attach and take off": attach,
        "of it, the digest of the weights": partial(weights_digest, target.model),
    }
    found = interleaved(
        dict.fromkeys(works, nullcontext), lambda name: seconds(works[name]), rounds
    )
    return {name: spread([1e3 * t for t in times]) for name, times in found.items()}


@contextmanager
def _hooked(model: Any, hook: Callable) -> Iterator[None]:
    handles = [layer.register_forward_hook(hook) for layer in find_decoder(model).layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _two_products(width: int, batch: int) -> Callable:
    """`restore` at one column and nothing else: the arithmetic that cannot be left out."""
    rows = torch.linalg.qr(torch.randn(width, min(RANK, width)))[0].T.contiguous()
    target = torch.zeros(batch, len(rows))

    def hook(_: Any, __: Any, hidden: Tensor) -> Tensor | None:
        if hidden.shape[1] > 1:
            return None
        states = hidden.squeeze(1)
        change = torch.addmm(target, states, rows.T, alpha=-1)
        return torch.addmm(states, change, rows).unsqueeze(1)

    return hook


@contextmanager
def _idle_layers(model: Any) -> Iterator[None]:
    """Decoder layers that hand on what they get. The first still fills its cache: its length tells
    how far the request has come."""
    text = model.config.get_text_config(decoder=True)
    layers = find_decoder(model).layers
    heads, size = text.num_key_value_heads, text.hidden_size // text.num_attention_heads

    def first(hidden: Tensor, *_: Any, past_key_values: Any, **__: Any) -> Tensor:
        blank = hidden.new_zeros(len(hidden), heads, hidden.shape[1], size)
        past_key_values.update(blank, blank, 0)
        return hidden

    def other(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden

    try:
        for number, layer in enumerate(layers):
            layer.forward = other if number else first
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
