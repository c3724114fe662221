"""Guards, batches and states of the models in ``tests.families``."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from tests import families, tiny
from tests.families import Family
from tests.tiny import generate
from vlm_safeguard.artifact.config import ImageMarkup
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.loading import LoadedModel

PROMPTS = ["What is this?", "How many of them are there, would you say?"]
ALWAYS, NEVER = -1e9, 1e9


@cache  # the tests run one after the other, each on all families
def loaded_of(one: Family) -> LoadedModel:
    return one.build()


def decoder_of(one: Family, loaded: LoadedModel) -> Any:
    return loaded.model.get_submodule(one.decoder)


def text_layers(one: Family, loaded: LoadedModel) -> list[int]:
    """Layers that run without a picture too."""
    config = loaded.model.config.get_text_config(decoder=True)
    skipped = getattr(config, "cross_attention_layers", None) or []
    return [layer for layer in range(families.LAYERS) if layer not in skipped]


def states_in(module: Any, run: Any) -> dict[int, Tensor]:
    """The residual stream (B, T, d) after every layer that ran: what the next one took in."""
    taken: dict[int, Tensor] = {}
    last = len(module.layers) - 1

    def take(layer: int) -> Any:
        def hook(_: Any, args: tuple, kwargs: dict) -> None:
            taken[layer - 1] = (args[0] if args else kwargs["hidden_states"]).clone()

        return hook

    def leave(_: Any, __: Any, output: Any) -> None:
        taken[last] = (output[0] if isinstance(output, tuple) else output).clone()

    handles = [
        layer.register_forward_pre_hook(take(n), with_kwargs=True)
        for n, layer in enumerate(module.layers)
    ]
    handles.append(module.layers[last].register_forward_hook(leave))
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    for layer in range(last - 1, -1, -1):  # past a layer that did not run the stream goes as it is
        taken.setdefault(layer, taken[layer + 1])
    return {layer: taken[layer] for layer in range(last + 1)}


def bare_states(
    one: Family, loaded: LoadedModel, prompt: str, pictured: bool = True
) -> dict[int, Tensor]:
    """Last states (d) of the language model by itself on the template's text: one row, no
    padding, no mask, no positions. Where the template writes no white space beside a picture,
    the text of a ``pictured`` request has none there."""
    if not one.text_alone:  # what its processor writes without the picture's own tokens
        ids = encode(loaded, [prompt], [families.photo(1)])["input_ids"][0].tolist()
        image = loaded.model.config.image_token_id
        return last_states(one, loaded, [token for token in ids if token != image])
    text = loaded.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": prompt}]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    if pictured and not one.exact:
        text = text.replace("User: ", "User:", 1)
    tokenizer = loaded.processor.tokenizer
    return last_states(one, loaded, tokenizer(text, add_special_tokens=False)["input_ids"])


def last_states(one: Family, loaded: LoadedModel, ids: list[int]) -> dict[int, Tensor]:
    options = {}
    if one.both_ways:
        options["attention_mask"] = torch.zeros(1, 1, len(ids), len(ids))
    module, row = decoder_of(one, loaded), torch.tensor([ids])
    states = states_in(module, lambda: module(input_ids=row, use_cache=False, **options))
    return {layer: state[0, -1] for layer, state in states.items()}


def guard_for(
    one: Family,
    loaded: LoadedModel,
    thresholds: float | list[float] = ALWAYS,
    source: str = "text",
    **steering: Any,
) -> Guard:
    """A guard gated by one source, and its markup as written down in the matrix."""
    layers = text_layers(one, loaded)
    gates = [tiny.gate(source, *layers, threshold=0.0)]
    made = tiny.guard(loaded.model, gates, layers=[layers[1], layers[-1]], **steering)
    if isinstance(thresholds, float):
        thresholds = [thresholds] * len(layers)
    made = tiny.with_thresholds(made, [thresholds])
    tokens, *wrapper = one.markup
    before, after, inner = (
        loaded.processor.tokenizer.encode(text, add_special_tokens=False)
        for text in (*wrapper, one.inner)
    )
    ids = loaded.processor.tokenizer.convert_tokens_to_ids(tokens)
    markup = ImageMarkup(
        token_ids=ids, before=before, after=after, inner=inner, pad_id=families.PAD
    )
    return tiny.changed(made, markup=markup)


def half_open(loaded: LoadedModel, made: Guard, inputs: dict[str, Tensor]) -> tuple[Guard, int]:
    """The guard with the thresholds of its gate between two rows; which of them it opens."""
    gate = made.config.gates[0]
    with made.attach(loaded.model) as session:
        generate(loaded.model, inputs, max_new_tokens=1)
        scores = torch.tensor([d.parts[f"{gate.source}.0"] for d in session.decisions])
    middle = torch.tensor(gate.thresholds) + scores.mean(0)
    return tiny.with_thresholds(made, [middle.tolist()]), int(scores.sum(1).argmax())


def batch(one: Family, loaded: LoadedModel) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Two requests as one batch and each alone; the second is text alone where that goes."""
    pictures = [families.photo(1), None if one.mixed else families.photo(2)]
    alone = [encode(loaded, [p], [i]) for p, i in zip(PROMPTS, pictures, strict=True)]
    return encode(loaded, PROMPTS, pictures), alone
