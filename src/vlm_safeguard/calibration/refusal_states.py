"""Records the hidden states behind the first tokens of a model's own refusals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlm_safeguard.data.inputs import Query, batches
from vlm_safeguard.data.sampling import spaced
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.residual_stream import (
    Decoder,
    hidden_of,
    verify_residual_stream,
    watching,
)
from vlm_safeguard.model.text_only import head_in_one_piece
from vlm_safeguard.utils.progress import Progress

TOKENS = 2  # of a refusal, behind which states are recorded: they steer up to the third token
MOST, FEWEST = 160, 16  # refusals


@torch.inference_mode()
def record_refusals(
    loaded: LoadedModel, refused: Sequence[Query], progress: Progress, batch: int = 32
) -> Tensor | None:
    """Record the mean state behind each of the first tokens of refusals, as the model writes them.

    Args:
        loaded: the model and its processor.
        refused: requests whose answers begin as the model's refusals do.
        progress: where progress is reported.
        batch: requests per batch.

    Returns:
        States (TOKENS, L, d), float32, after each decoder layer; None if ``refused`` are fewer than
        ``FEWEST``.
    """
    if len(refused) < FEWEST:
        progress.say(f"{len(refused)} refusals are too few to steer later tokens towards them")
        return None
    asked = spaced(refused, MOST)
    decoder = verify_residual_stream(loaded.model)
    total = torch.zeros(TOKENS, len(decoder.layers), decoder.hidden_size, dtype=torch.float64)
    for group in progress.track(batches(loaded.processor.tokenizer, asked, batch), "refusals"):
        inputs = encode(loaded, [asked[n].text for n in group], [None] * len(group))
        total += _last_states(loaded.model, decoder, inputs)[1:].double().sum(2)
    return (total / len(asked)).float()


def _last_states(model: Any, decoder: Decoder, inputs: dict[str, Tensor]) -> Tensor:
    """States (1 + TOKENS, L, B, d) at the last prompt token and behind each token of an answer."""
    seen: list[list[Tensor]] = [[] for _ in decoder.layers]

    def see(layer: int, output: Any) -> None:
        seen[layer].append(hidden_of(output)[:, -1].float().cpu())

    count = TOKENS + 1  # the last token is made only so that the pass before it runs
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "num_beams": 1}
    with watching(decoder, range(len(seen)), see), head_in_one_piece(model):
        model.generate(**inputs, **options)
    return torch.stack([torch.stack(states) for states in seen], 1)
