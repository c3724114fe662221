"""Time to first token and time per token, guarded / unguarded, in lockstep."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from bench import peers
from bench.guards import Model, adding, gate_layers, layer_sets, restoring
from bench.subjects import Subjects
from bench.timing import interleaved, spread
from vlm_safeguard.evaluation.metrics import paired_timing
from vlm_safeguard.evaluation.metrics.paired_timing import Paired
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.text_only import text_columns

AGAIN = "unguarded again"

Hooked = Callable[[Any], AbstractContextManager[Any]]  # puts hooks on a model


def on_the_vlm(subject: Subjects, batch: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Guards of every shape on the VLM, requests with a picture."""
    target, sets = subject.vlm, layer_sets(subject.vlm.depth)
    guards: dict[str, Guard] = {}
    brief: set[str] = set()  # timed to the first token only: behind it they are as without text
    for name, layers in sets.items():
        made = partial(restoring, target, layers)
        guards[f"{name}, shut"] = made(text=False, is_open=False)
        guards[f"{name}, open, last prompt token"] = made(text=False, is_open=True)
        guards[f"{name}, open, every token"] = made(text=False, is_open=True, tokens=None)
        for state, is_open in (("shut", False), ("open", True)):
            key = f"{name}, text-only pass, {state}"
            guards[key] = made(text=True, is_open=is_open)
            brief.add(key)
    guards["all, paper's formula"] = adding(target, sets["all"])
    setups: dict[str, Hooked] = {key: guard.attach for key, guard in guards.items()}
    setups["all, naive hook"] = partial(_with, peers.naive, _vectors(target, sets["all"]))
    inputs = subject.inputs(batch, picture=True)
    found = _ratios(_in_lockstep(target.model, setups, inputs, tokens, rounds, brief))
    words = subject.inputs(batch, picture=False)["input_ids"].shape[1]
    whole = inputs["input_ids"].shape[1]
    predicted = {
        f"{name}, text-only pass, {state}": figure
        for name, layers in sets.items()
        for state, figure in _predicted(words, whole, layers, target.depth).items()
    }
    return found | {"tokens": {"text": words, "whole": whole}, "predicted_first": predicted}


def one_by_one(
    subject: Subjects, shapes: Sequence[tuple[int, int]], rounds: int
) -> list[dict[str, Any]]:
    """Time to the first token of single requests, guards on all layers with a text-only pass.

    ``shapes``: how many questions and how many pictures a request holds.
    """
    target = subject.vlm
    layers = layer_sets(target.depth)["all"]
    made = partial(restoring, target, layers, text=True)
    setups: dict[str, Hooked] = {
        "shut": made(is_open=False).attach,
        "shut, with refusal signs": made(is_open=False, signs=True).attach,
        "open": made(is_open=True).attach,
    }
    found = []
    for questions, images in shapes:
        inputs = subject.long_inputs(questions, images)
        ids = inputs["input_ids"]
        words = int(text_columns(ids, inputs["attention_mask"], target.markup).sum())
        runs = _in_lockstep(target.model, setups, inputs, 1, rounds)
        found.append(
            {
                "images": images,
                "tokens": {"text": words, "whole": ids.shape[1]},
                "first_s": spread([run.first_s for run in runs[AGAIN]]),
                "first": {name: spread([run.first for run in of]) for name, of in runs.items()},
                "predicted": _predicted(words, ids.shape[1], layers, target.depth),
            }
        )
    return found


def _predicted(words: int, whole: int, layers: Sequence[int], depth: int) -> dict[str, float]:
    """Time to the first token with a text-only pass over that without, as its share says."""
    ends = {"shut": max(gate_layers(layers, depth)), "open": max(layers)}
    return {state: 1 + share(words, whole, last, depth) for state, last in ends.items()}


def share(words: int, whole: int, last: int, depth: int) -> float:
    """What part of a prompt's pass through the decoder its text-only pass is: tokens and layers."""
    return words / whole * (last + 1) / depth


def on_the_llm(subject: Subjects, batch: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Peers, the naive hook and guards on the language model alone, all layers."""
    target, layers = subject.llm, layer_sets(subject.llm.depth)["all"]
    vectors, inputs = _vectors(target, layers), subject.inputs(batch, picture=False)
    setups: dict[str, Hooked] = {}
    for name, peer in peers.LIBRARIES.items():
        peers.check(peer, target.model, inputs, vectors)
        setups[name] = partial(_with, peer, vectors)
    setups["naive hook"] = partial(_with, peers.naive, vectors)
    guards = {
        "guard, paper's formula": adding(target, layers),
        "guard, every token": restoring(target, layers, text=False, is_open=True, tokens=None),
        "guard, last prompt token": restoring(target, layers, text=False, is_open=True),
    }
    setups |= {key: guard.attach for key, guard in guards.items()}
    return _ratios(_in_lockstep(target.model, setups, inputs, tokens, rounds))


def _vectors(target: Model, layers: list[int]) -> peers.Vectors:
    generator = torch.Generator().manual_seed(0)
    width = target.identity.hidden_size
    return {n: 0.01 * torch.randn(width, generator=generator) for n in layers}


def _with(peer: peers.Peer, vectors: peers.Vectors, model: Any) -> AbstractContextManager[None]:
    return peer(model, vectors)


def _ratios(found: Mapping[str, Sequence[Paired]]) -> dict[str, Any]:
    """What ``_in_lockstep`` found, summed up."""
    rows = {}
    for name, runs in found.items():
        rows[name] = {"first": spread([run.first for run in runs])}
        if not math.isnan(runs[0].per_token):
            rows[name]["per_token"] = spread([run.per_token for run in runs])
    plain = found[AGAIN]
    return {
        "unguarded": {
            "first_s": spread([run.first_s for run in plain]),
            "per_token_s": spread([run.per_token_s for run in plain]),
        },
        "ratios": rows,
    }


def _in_lockstep(
    model: Any,
    setups: Mapping[str, Hooked],
    inputs: Mapping[str, Any],
    tokens: int,
    rounds: int,
    brief: Collection[str] = (),
) -> dict[str, list[Paired]]:
    """A model with hooks beside its twin without any, every setup once a round, and none at all.
    ``brief``: timed to the first token only."""
    plain = paired_timing.twin(model)

    def work(name: str) -> Paired:
        count = 1 if name in brief else tokens
        calls = [partial(paired_timing.write, one, inputs, count) for one in (plain, model)]
        with setups[name](model):
            return paired_timing.side_by_side(calls[0], calls[1], count)

    setups = {AGAIN: nullcontext, **setups}
    return interleaved(dict.fromkeys(setups, nullcontext), work, rounds)
