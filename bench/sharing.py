"""The text-only pass by itself, or in one forward with the prompt it belongs to."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from bench.guards import gate_layers, layer_sets
from bench.subjects import Subjects
from bench.timing import interleaved, ratios, seconds
from vlm_safeguard.model.residual_stream import EnoughSeen, find_decoder
from vlm_safeguard.model.text_only import text_columns, text_only, text_pass


def measured(subject: Subjects, batch: int, rounds: int) -> dict[str, Any]:
    """Time of a prompt's pass with its text-only pass in each way, over that of the prompt alone.

    In one forward the text's rows stand below the request's own, as wide as those are. Such a pass
    cannot end early, and steers no layer by what the text's states say further up.
    """
    target, inputs = subject.vlm, subject.inputs(batch, picture=True)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    columns = text_columns(ids, mask, target.markup)
    text = text_only(ids, columns, target.markup.pad_id)
    last = max(gate_layers(layer_sets(target.depth)["all"], target.depth))
    merged = inputs | {
        "input_ids": torch.cat([ids, _as_wide(text[0], ids, target.markup.pad_id)]),
        "attention_mask": torch.cat([mask, _as_wide(text[1], ids, 0)]),
    }
    model = target.model

    def prompt() -> None:
        model(**inputs, use_cache=True, logits_to_keep=1)

    def stopped() -> None:
        def stop(*_: Any) -> None:
            raise EnoughSeen

        handle = find_decoder(model).layers[last].register_forward_hook(stop)
        try:
            with suppress(EnoughSeen):
                text_pass(model, *text)
        finally:
            handle.remove()
        prompt()

    def whole() -> None:
        text_pass(model, *text)
        prompt()

    works: dict[str, Callable[[], None]] = {
        "the prompt alone": prompt,
        "a pass before, ended at the gate's last layer": stopped,
        "a pass before, to the last layer": whole,
        "in one forward with the prompt": lambda: model(**merged, use_cache=True, logits_to_keep=1),
    }
    with torch.inference_mode():
        found = interleaved(
            dict.fromkeys(works, nullcontext), lambda name: seconds(works[name]), rounds
        )
    base = found.pop("the prompt alone")
    return {name: ratios(times, base) for name, times in found.items()}


def _as_wide(table: Tensor, like: Tensor, fill: int) -> Tensor:
    """Padded on the left."""
    wide = table.new_full((len(table), like.shape[1]), fill)
    wide[:, like.shape[1] - table.shape[1] :] = table
    return wide
