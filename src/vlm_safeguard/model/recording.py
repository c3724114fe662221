"""Records the residual stream at the last prompt token after every decoder layer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_safeguard.artifact.config import TextFrame
from vlm_safeguard.data.inputs import Query, batches
from vlm_safeguard.data.prompts import AnchorPair
from vlm_safeguard.errors import ModelError
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.residual_stream import (
    Decoder,
    EnoughSeen,
    hidden_of,
    verify_residual_stream,
    watching,
)
from vlm_safeguard.model.shared_prefix import SharedPrefix
from vlm_safeguard.model.text_only import last_logits
from vlm_safeguard.model.words import readings, with_probe, word_weights
from vlm_safeguard.utils.progress import Progress


@torch.inference_mode()
def record(
    loaded: LoadedModel,
    items: Sequence[Query],
    folder: Path,
    *,
    what: str = "states",
    batch: int = 32,
    layers: int | None = None,
    decoder: Decoder | None = None,
    read_pictures: bool = False,
    frame: TextFrame | None = None,
    encoded: Callable[[list[int]], dict[str, Tensor]] | None = None,
    run: Callable[[list[int], dict[str, Tensor]], None] | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Record the hidden states at the last prompt token after each decoder layer.

    The states are read by hooks, because a model's ``hidden_states`` may be normalised or
    unsteered. A layer that is skipped without a picture has the state of the layer below.

    Args:
        loaded: the model and its processor.
        items: n requests.
        folder: holds a file of the states, so that memory does not grow with n.
        what: name of the progress bar.
        batch: requests per batch.
        layers: number of layers to record, from the first one; by default all. The pass ends there.
        decoder: the verified decoder. Required for a guarded model, because the guard does not
            allow the forward pass that verifies it.
        read_pictures: for a guard that reads pictures, see ``encode``.
        frame: where the words of a text are, and the probe that is put behind each. With it, the
            mean of the states over the words stands behind those at the last prompt token, and then
            the states at the end of the probe (``readings``). Not for a ``run`` that writes an
            answer.
        encoded: makes the inputs, padded on the left, of the items of a batch, given by their
            indices, in place of ``encode``.
        run: runs the model on such a batch, in place of one forward pass. The last pass over more
            than one token is recorded, so not the steps of ``generate``.
        progress: where progress is reported; by default nowhere.

    Returns:
        States (n, L, d), or (n, L, 2 d) with means and (n, L, 3 d) with a probe, float32, as a
        memory map.

    Raises:
        ModelError: the decoder cannot be verified, a state is NaN or Inf, or there is a ``frame``
            and a layer does not put out the states of all tokens.
    """
    own_pass = decoder is None and run is None
    shared = SharedPrefix(loaded.model, loaded.processor) if own_pass else None
    decoder = decoder or verify_residual_stream(loaded.model)
    probe = frame.probe if frame else []
    count = 1 + (frame is not None) + bool(probe)  # of states that are recorded of a layer
    depth, width = layers or len(decoder.layers), count * decoder.hidden_size
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".states", delete=False) as handle:
        path = handle.name
    size = max(1, len(items)) * depth * width
    states = torch.from_file(path, shared=True, size=size, dtype=torch.float32)
    states = states[: len(items) * depth * width].view(len(items), depth, width)
    ends = layers is not None or shared is not None  # nothing above the last layer is needed
    finite = torch.ones(len(items), depth, dtype=torch.bool)  # asked batch by batch: see above
    seen: dict[int, Tensor] = {}
    prompt = False  # whether this pass is over more than one token
    weights, lengths = torch.empty(0), torch.empty(0)

    def read(hidden: Tensor, first: bool) -> Tensor:
        nonlocal weights
        if frame is None:
            return hidden[:, -1].float().cpu()
        if first:
            weights = word_weights(lengths, hidden.shape[1], frame)
        if hidden.shape[1] != weights.shape[1]:
            raise ModelError(
                f"{loaded.name}: a layer does not put out the states of all words of a text, so "
                "their mean cannot be recorded"
            )
        return readings(hidden, weights.to(hidden.device), len(probe)).cpu()

    def see(layer: int, output: Any) -> None:
        # Batches are padded on the left: the last column is the last prompt token. A guard's
        # text-only pass comes before the request's own; decoding steps are one column wide.
        nonlocal prompt
        hidden = hidden_of(output)
        if layer == 0:  # higher ones may put out the last column alone
            prompt = hidden.shape[1] > 1
        if prompt:
            seen[layer] = read(hidden, layer == 0)
        if layer == depth - 1 and ends:
            raise EnoughSeen

    def usual(group: list[int]) -> dict[str, Tensor]:
        texts, images = [items[i].text for i in group], [items[i].image for i in group]
        return encode(loaded, texts, images, read_pictures)

    def forward(group: list[int], inputs: dict[str, Tensor]) -> None:
        if shared:
            shared.forward(inputs, len(probe))
        else:
            loaded.model(**inputs, use_cache=False, logits_to_keep=1)

    with watching(decoder, range(depth), see):
        groups = batches(loaded.processor.tokenizer, items, batch)
        for group in progress.track(groups, what) if progress else groups:
            seen.clear()
            inputs = with_probe((encoded or usual)(group), probe)
            lengths = inputs["attention_mask"].sum(1)
            with suppress(EnoughSeen):
                (run or forward)(group, inputs)
            found = torch.stack([seen[layer] for layer in range(depth)], 1)
            states[group], finite[group] = found, torch.isfinite(found).all(2)
    bad = (~finite).nonzero()
    if len(bad):
        raise ModelError(
            f"{loaded.name}: the states after layer {int(bad[:, 1].min())} hold NaN or Inf. Its "
            "weights are damaged, or its dtype overflows (try --dtype float32)"
        )
    return states


def record_with_logits(
    loaded: LoadedModel,
    items: Sequence[Query],
    folder: Path,
    read: Callable[[Tensor], Tensor],
    *,
    what: str = "states",
    frame: TextFrame | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``record``, in the same pass also what ``read`` finds in the logits of the answer's first
    token.

    Args:
        read: takes logits (B, vocabulary), float32, and returns what it finds in each row,
            (B, ...).

    Returns:
        States, and what was found, (n, ...).
    """
    shared, found = SharedPrefix(loaded.model, loaded.processor), dict[int, Tensor]()
    probe = len(frame.probe) if frame else 0

    def run(group: list[int], inputs: dict[str, Tensor]) -> None:
        logits = last_logits(shared.forward(inputs, probe), probe)
        found.update(zip(group, read(logits.float()).cpu(), strict=True))

    states = record(loaded, items, folder, what=what, frame=frame, run=run, progress=progress)
    return states, torch.stack([found[place] for place in range(len(items))])


def anchor_queries(pairs: Sequence[AnchorPair]) -> list[Query]:
    """The anchors as text: the harmful ones, then their harmless partners in the same order."""
    both = [pair.harmful for pair in pairs] + [pair.harmless for pair in pairs]
    return [Query(text, None) for text in both]


def anchor_states(
    loaded: LoadedModel, pairs: Sequence[AnchorPair], folder: Path, progress: Progress
) -> Tensor:
    """Record the states of the anchors as text, memory-mapped from ``folder`` as in ``record``.

    Returns:
        States (2, N, L, d): harmful anchors, then their harmless partners in the same order.
    """
    states = record(loaded, anchor_queries(pairs), folder, what="anchors", progress=progress)
    return states.view(2, len(pairs), *states.shape[1:])
