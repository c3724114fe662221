"""Derives the text-only version of a request: the same conversation without its images.

The language model may recognise harm in a text that the VLM no longer recognises with an image. The
text-only version is derived from the token ids, so that a plain ``model.generate(**inputs)`` is
guarded.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlm_safeguard.artifact.config import ImageMarkup
from vlm_safeguard.errors import ModelError
from vlm_safeguard.model.chat import process, render
from vlm_safeguard.model.control_tokens import ControlTokens
from vlm_safeguard.model.loading import LoadedModel

# Square, wide and tall, small and large: pictures that processors cut into different tiles.
PROBE_SIZES = ((64, 64), (320, 64), (64, 320), (900, 600), (600, 900), (48, 40))
PROBE = "How do I bake bread?"


def find_markup(loaded: LoadedModel) -> ImageMarkup:
    """Find the image tokens by encoding a request without a picture and with pictures of several
    sizes.

    It is checked that removing the image tokens gives the request without the picture, up to white
    space where the picture was: some templates write a space before text but not before a picture,
    and some tokenizers merge the newlines around a picture with those of the text.

    Raises:
        ModelError: removing the image tokens does not give the request without the picture.
    """
    tokenizer, image_id = loaded.processor.tokenizer, image_token(loaded)
    plain = _ids(loaded, render(loaded.processor, PROBE, 0))
    pictured = render(loaded.processor, PROBE, 1)
    rows = [_ids(loaded, pictured, Image.new("RGB", size, (127, 127, 127))) for size in PROBE_SIZES]
    blocks = [_block(tokenizer, plain, row, image_id, loaded.name) for row in rows]
    # Tokens that no text can hold, because ``encode`` breaks them where a user types them.
    special = ControlTokens.of(loaded.processor).ids | {image_id}
    markup = _markup(tokenizer, blocks, special)
    if markup is None:
        raise ModelError(
            f"{loaded.name}: what its template writes around a picture depends on the picture's "
            "size, so the text-only prompt cannot be derived from the token ids"
        )
    for row, block in zip(rows, blocks, strict=True):
        reading = [row[i] for i in markup.kept(row)]
        same = reading == plain if block.exact else _says(tokenizer, reading, plain)
        if not same:
            raise _unlike(loaded.name)
    return markup


def image_token(loaded: LoadedModel) -> int:
    """The id of the image token in the model's configuration.

    Raises:
        ModelError: the configuration has none.
    """
    config = loaded.model.config
    for name in ("image_token_id", "image_token_index"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    raise ModelError(
        f"{loaded.name}: its configuration names no image token, so it takes no pictures: "
        "VLM-Safeguard guards vision-language models"
    )


@dataclass(frozen=True)
class _Block:
    """The tokens of a picture: from the first to the last image token, before and after them."""

    before: tuple[int, ...]
    inside: tuple[int, ...]
    after: tuple[int, ...]
    exact: bool  # else up to white space


def _block(tokenizer: Any, plain: list[int], full: list[int], image_id: int, name: str) -> _Block:
    """The tokens around the image tokens of ``full`` that must be removed to get ``plain``."""
    places = [i for i, token in enumerate(full) if token == image_id]
    if not places:
        raise ModelError(
            f"{name}: its chat template puts no image token into the prompt: get the processor "
            "with the template that its publisher gives for pictures"
        )
    first, last = places[0], places[-1] + 1
    cuts = [(a, b) for a in range(first, -1, -1) for b in range(last, len(full) + 1)]
    extra = len(full) - len(plain)
    # Where a wrapper equals its neighbour the cut can slide: prefer the one that keeps the text.
    exact = [(a, b) for a, b in cuts if b - a == extra and full[:a] + full[b:] == plain]
    near = exact or [
        (a, b)
        for a, b in cuts
        if first - a <= WRAPPER and b - last <= WRAPPER
        if _says(tokenizer, full[:a] + full[b:], plain)
    ]
    if not near:
        raise _unlike(name)
    if not exact:  # no less white space than the text alone has, if possible, and no more than that
        length = len(tokenizer.decode(plain))
        over = {(a, b): len(tokenizer.decode(full[:a] + full[b:])) - length for a, b in near}
        near = sorted(near, key=lambda cut: (over[cut] < 0, abs(over[cut])))
    a, b = near[0]
    inside = tuple(full[first:last])
    return _Block(tuple(full[a:first]), inside, tuple(full[last:b]), bool(exact))


WRAPPER = 12  # tokens at most around a picture where the cut is not exact


def _markup(tokenizer: Any, blocks: list[_Block], special: frozenset[int]) -> ImageMarkup | None:
    """One markup for all blocks, or None if the tokens around pictures differ too much."""
    before, after = {b.before for b in blocks}, {b.after for b in blocks}
    inside = _same_kind(tokenizer, {token for b in blocks for token in b.inside}, special)
    loose = {token for wrap in (*before, *after) for token in wrap if token in special}
    if len(before) > 1 or len(after) > 1 or loose & inside:
        # Wrappers that change with the picture: their special tokens count as the picture's own.
        before = {_up_to(wrap, special) for wrap in before}
        after = {_up_to(wrap[::-1], special)[::-1] for wrap in after}
        inside |= {t for b in blocks for t in b.before[len(min(before)) :]}
        inside |= {t for b in blocks for t in b.after[: len(b.after) - len(min(after))]}
        if len(before) > 1 or len(after) > 1:
            return None
    return ImageMarkup(
        token_ids=sorted(inside & special),
        before=list(before.pop()),
        after=list(after.pop()),
        inner=sorted(inside - special),
        pad_id=tokenizer.pad_token_id,
    )


def _up_to(wrap: tuple[int, ...], special: frozenset[int]) -> tuple[int, ...]:
    """The tokens of a wrapper before its first special token."""
    place = next((i for i, token in enumerate(wrap) if token in special), len(wrap))
    return wrap[:place]


def _same_kind(tokenizer: Any, tokens: set[int], special: frozenset[int]) -> set[int]:
    """``tokens``, and special tokens that differ from one of them in numbers only: tags of rows and
    columns that no test picture has."""
    kinds = {
        token: re.sub(r"\d+", "#", str(tokenizer.convert_ids_to_tokens(token))) for token in special
    }
    seen = {kinds[token] for token in tokens & special if "#" in kinds[token]}
    return tokens | {token for token in special if kinds[token] in seen}


def _says(tokenizer: Any, ids: list[int], plain: list[int]) -> bool:
    """Whether two rows of ids decode to the same text up to white space."""
    return "".join(tokenizer.decode(ids).split()) == "".join(tokenizer.decode(plain).split())


def _unlike(name: str) -> ModelError:
    return ModelError(
        f"{name}: its chat template words a request with a picture differently beyond the "
        "picture itself, so the text-only prompt cannot be derived from the token ids"
    )


def _ids(loaded: LoadedModel, text: str, *pictures: Image.Image) -> list[int]:
    """Token ids of a rendered request."""
    batch = process(loaded.processor, [text], [pictures])
    return [int(token) for token in batch["input_ids"][0]]


def text_columns(input_ids: Tensor, attention_mask: Tensor, markup: ImageMarkup) -> Tensor:
    """Which columns of a padded batch belong to its text-only version, (B, T)."""
    chosen = torch.zeros(input_ids.shape, dtype=torch.bool)
    ids, mask = input_ids.cpu(), attention_mask.cpu().bool()
    for row in range(len(ids)):
        places = mask[row].nonzero().flatten()
        kept = markup.kept(ids[row][places].tolist())
        chosen[row, places[kept]] = True
    return chosen.to(input_ids.device)


def with_pictures(input_ids: Tensor | None, markup: ImageMarkup, rows: int) -> list[bool]:
    """Which of the rows of a batch (B, T) hold a picture; none that is known without ids."""
    if input_ids is None:
        return [False] * rows
    tokens = torch.tensor(markup.token_ids, device=input_ids.device)
    found: list[bool] = torch.isin(input_ids, tokens).any(1).tolist()
    return found


def rows_of(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The tokens of each row of a padded batch (B, T)."""
    chosen = mask.bool().tolist()
    return [
        [token for token, kept in zip(row, kept_of, strict=True) if kept]
        for row, kept_of in zip(ids.tolist(), chosen, strict=True)
    ]


def padded(rows: Sequence[Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    """Rows of ids (T,) as a batch, left-padded: ids and mask (B, T)."""
    width = max(map(len, rows))
    ids = rows[0].new_full((len(rows), width), pad_id)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, width - len(tokens) :] = tokens
        mask[row, width - len(tokens) :] = 1
    return ids, mask


def text_only(input_ids: Tensor, columns: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    """Text-only ids and mask of a batch, left-padded: both (B, T') for inputs (B, T)."""
    rows = [source[chosen] for source, chosen in zip(input_ids, columns, strict=True)]
    return padded(rows, pad_id)


def positions_of(attention_mask: Tensor) -> Tensor:
    """Position ids (B, T) that count attended tokens only."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def text_pass(
    model: Any,
    ids: Tensor,
    mask: Tensor,
    forward: Callable[..., Any] | None = None,
    behind: int = 0,
) -> Any:
    """Run the model on text, so that hooks on its decoder layers can read the hidden states.

    This is the model's own forward pass without a picture, so embeddings, position ids and masks
    are what the model computes. ``__call__`` is not used, so hooks on the model itself do not run.

    Args:
        model: the whole VLM.
        ids, mask: token ids and attention mask (B, T), padded on either side.
        forward: the model's own ``forward``, if a guard has replaced it.
        behind: how many columns come behind that whose logits are computed.
    """
    known = inspect.signature(type(model).forward).parameters
    options: dict[str, Any] = {"position_ids": positions_of(mask), "use_cache": False}
    if "logits_to_keep" in known:
        options["logits_to_keep"] = kept_column(behind)
    if "token_type_ids" in known:  # 0 is text, 1 what comes after it (PaliGemma) or a picture
        options["token_type_ids"] = torch.zeros_like(ids)
    return (forward or model.forward)(input_ids=ids, attention_mask=mask, **options)


@contextmanager
def head_in_one_piece(model: Any) -> Iterator[None]:
    """Copies what the model's head reads into one piece, while the context is open.

    The last columns of a batch are a view with gaps. On CPUs torch multiplies it several times
    slower than a copy (float32), or up to hundreds of times (bfloat16). The results may differ in
    their rounding, so this is for passes of our own and for answers that are measured, guarded and
    unguarded alike, and not for a user's request.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, args: tuple(one.contiguous() for one in args))
    try:
        yield
    finally:
        handle.remove()


def kept_column(behind: int) -> int | slice:
    """What a model's ``logits_to_keep`` is told, for the logits at one column with ``behind`` more
    after it. Models take a tensor of columns too, but it would have to be where the states are."""
    return slice(-1 - behind, -behind) if behind else 1


def last_logits(output: Any, behind: int = 0) -> Tensor:
    """The logits (B, vocabulary) at the last column of what a pass returned, or at that with
    ``behind`` more after it, of all or alone (``kept_column``).

    Raises:
        ModelError: the model returns no logits.
    """
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ModelError(
            "the model's forward returns no `logits`, which the guard's text gate reads: load the "
            "model with its language modelling head"
        )
    return logits[:, -1] if logits.shape[1] == 1 else logits[:, -1 - behind]
