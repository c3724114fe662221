"""What is read of a request's text beside its last token: its words, and a probe behind it.

The probe is the beginning of an answer. A language model that is about to go on from there holds
in its state what the request would do, more plainly than in the state in which it is about to
answer. (Jiang et al. 2023, "Scaling Sentence Embeddings with Large Language Models", take
embeddings so.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlm_safeguard.artifact.config import TextFrame
from vlm_safeguard.errors import ModelError
from vlm_safeguard.model.chat import process, render
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.residual_stream import verify_residual_stream

PROBE_WORDS = "In one word, what this would do to other people is to"


def unlike_requests(processor: Any) -> dict[str, Tensor] | None:
    """Inputs of two requests that differ in all of their words: what they share is the template's.

    Returns:
        None if the template takes no request without a picture.
    """
    try:
        return process(processor, [render(processor, word, 0) for word in ("a", "b")], [(), ()])
    except ModelError:
        return None


def find_frame(loaded: LoadedModel) -> TextFrame | None:
    """How many tokens the chat template writes before and behind a request's words, and the tokens
    of the probe.

    Returns:
        None if the template takes no request without a picture, or a layer does not put out the
        states of all tokens.

    Raises:
        ModelError: as ``verify_residual_stream``.
    """
    inputs = unlike_requests(loaded.processor)
    if inputs is None or not verify_residual_stream(loaded.model).whole:
        return None
    first, second = inputs["input_ids"]
    same = (first == second).long()
    return TextFrame(
        before=int(same.cumprod(0).sum()),
        after=int(same.flip(0).cumprod(0).sum()),
        probe=loaded.processor.tokenizer(PROBE_WORDS, add_special_tokens=False)["input_ids"],
    )


def with_probe(inputs: Mapping[str, Tensor], probe: Sequence[int]) -> dict[str, Tensor]:
    """Inputs of texts, padded on the left, with a probe behind each. Inputs that have a value for
    each token, such as token types, go on with zeros, which stand for text."""
    ids, found = inputs["input_ids"], dict(inputs)
    added = {"input_ids": ids.new_tensor(probe), "attention_mask": ids.new_ones(len(probe))}
    for name, value in inputs.items() if probe else ():
        if value.shape == ids.shape:
            more = added.get(name, ids.new_zeros(len(probe))).to(value)
            found[name] = torch.cat([value, more.expand(len(ids), -1)], 1)
    return found


def word_weights(lengths: Tensor, width: int, frame: TextFrame) -> Tensor:
    """Weights (B, width) that average over the words of each row of a pass.

    They are equal for all tokens but those of the frame. A row without others, such as an empty
    request, is averaged over all that come after the first ``frame.before``, if there are any, else
    over the whole row, without the probe.

    Args:
        lengths: number of tokens of each row, those of the probe among them, (B,).
        width: the pass computed so many columns, the last ones of rows that are padded on the left.
    """
    columns = torch.arange(width, device=lengths.device)
    place = lengths[:, None] - width + columns  # of each column's token in its row
    end = width - len(frame.probe)
    said = (place >= 0) & (columns < end)
    behind = said & (place >= frame.before)
    chosen = behind & (columns < end - frame.after)
    chosen = torch.where(chosen.any(1, keepdim=True), chosen, behind)
    chosen = torch.where(chosen.any(1, keepdim=True), chosen, said)
    return chosen.float() / chosen.sum(1, keepdim=True)


def readings(states: Tensor, weights: Tensor, probe: int) -> Tensor:
    """What gates may read of states (B, T, d) of texts: those at the last token of the text, their
    mean by weights (B, T) and, behind a probe of so many tokens, those at its end: (B, 2 d) or
    (B, 3 d), float32."""
    # States of padding may be NaN, which a weight of zero would keep.
    chosen = states.float().masked_fill(weights[..., None] == 0, 0.0)
    mean = torch.bmm(weights[:, None], chosen).squeeze(1)
    found = [states[:, -1 - probe].float(), mean]
    if probe:
        found.append(states[:, -1].float())
    return torch.cat(found, 1)
