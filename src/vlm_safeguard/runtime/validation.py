"""Refuses calls that could bypass the gate or make a row's result depend on its batch.

Checks the settings of ``generate``, the prompt, and each later forward call.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlm_safeguard.artifact.config import GuardConfig, ImageMarkup
from vlm_safeguard.errors import GuardRuntimeError, PromptTooLong
from vlm_safeguard.model import kv_cache, positions
from vlm_safeguard.model.weights import adapter_names, adapters_at_work
from vlm_safeguard.runtime.prompt_inputs import after_padding
from vlm_safeguard.runtime.request import Request

_STEERED = "_vlm_safeguard_steered"  # on a cache; a copy of the cache carries it along

# Settings of `generate`, by argument or in a GenerationConfig, that run other models, call the
# model in an order of their own, or take its calls out of the hooks' reach.
_UNGUARDED = (
    "assistant_model",
    "assistant_early_exit",
    "is_assistant",
    "prompt_lookup_num_tokens",
    "use_mtp",
    "speculation_type",
    "custom_generate",
    "penalty_alpha",
    "dola_layers",
    "constraints",
    "force_words_ids",
    "token_healing",
    "compile_config",
)
# The keywords of calls that hold several requests in one row (packing, continuous batching), where
# they are not what the model takes its cache by.
_PACKED = {"cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "block_table", "cache"}
_PACKED -= set(kv_cache.NAMES)


def check_settings(model: Any, options: Mapping[str, Any]) -> None:
    """Refuse ways of generating that are not guarded, wherever they are set.

    An argument counts before ``generation_config``, that before the model's own, as in
    ``generate``.

    Raises:
        GuardRuntimeError: a setting is not guarded.
    """
    setting = partial(_setting, model, options)
    for name in _UNGUARDED:
        value = setting(name)
        if value is not None and value is not False and value != 0:
            raise GuardRuntimeError(f"generate({name}=...) is not guarded: leave it out")
    if (setting("num_beam_groups") or 1) != 1:
        raise GuardRuntimeError("generate(num_beam_groups=...) is not guarded: leave it out")
    if (setting("guidance_scale") or 1) != 1:
        raise GuardRuntimeError(
            "generate(guidance_scale=...) runs a second prompt beside the guarded one: leave it out"
        )
    if setting("cache_implementation") == "paged":
        raise GuardRuntimeError(
            "continuous batching (a paged cache) is not guarded: use model.generate with a batch, "
            "or vlm-safeguard serve"
        )


def _setting(model: Any, options: Mapping[str, Any], name: str) -> Any:
    """What ``generate`` would take: the argument, else what a configuration has, or None."""
    if name in options:
        return options[name]
    sources = (options.get("generation_config"), getattr(model, "generation_config", None))
    values = (getattr(source, name, None) for source in sources)
    return next((value for value in values if value is not None), None)


def check_left_padded(request: Request) -> None:
    """Refuse a prompt that ``generate`` would not continue at its last token."""
    if any(column != request.prompt_width - 1 for column in request.last_prompt):
        raise GuardRuntimeError("generate continues at the last column: pad on the left")


def check_not_packed(options: Mapping[str, Any], mask: Tensor | None = None) -> None:
    """Refuse a call that holds several requests in one row: only the last would be read.

    ``mask`` (B, T) is the prompt's, with the first call.
    """
    packed = any(options.get(name) is not None for name in _PACKED)
    places = options.get("position_ids")
    if isinstance(places, Tensor) and places.ndim == 3 and len(places) == 4:
        places = places[0]  # M-RoPE: places in the text, then the three that pictures count in
    if mask is not None and isinstance(places, Tensor) and places.ndim == 2:
        both = mask[:, 1:].bool() & mask[:, :-1].bool()
        packed = packed or bool(((places.diff(dim=1) < 0) & both[:, : places.shape[1] - 1]).any())
    if packed:
        raise GuardRuntimeError(
            "several requests packed into one row (continuous batching, restarting positions) are "
            "not guarded: give each a row of its own"
        )


def check_padding_is_told(
    model: Any,
    config: GuardConfig,
    ids: Tensor | None,
    options: Mapping[str, Any],
    *,
    generating: bool,
) -> None:
    """Refuse a prompt without attention mask where the model and the guard would take different
    tokens for padding.

    Without a mask the guard takes for padding what leads a row; a forward call attends to all, and
    ``generate`` masks every pad token, unless it is an end token too.

    Args:
        ids: of the whole prompt (B, T). generating: whether they go to ``generate``.

    Raises:
        GuardRuntimeError: the two differ, or a row ends in a pad token, which may be a word.
    """
    if ids is None or options.get("attention_mask") is not None or ids.ndim < 2:
        return
    pad = config.markup.pad_id
    own, theirs = after_padding(ids, pad), torch.ones_like(ids, dtype=torch.bool)
    if generating:
        used, ends = (_setting(model, options, f"{n}_token_id") for n in ("pad", "eos"))
        ends = ends if isinstance(ends, list | tuple | Tensor) else [ends]
        if used is not None and int(used) not in [int(end) for end in ends if end is not None]:
            theirs = ids != int(used)
    if bool((own != theirs).any()) or (len(ids) > 1 and bool((ids[:, -1:] == pad).any())):
        raise GuardRuntimeError(
            "without an attention_mask it is ambiguous which tokens are padding: pass the mask "
            "that the processor returned with input_ids"
        )


def carry_on(
    request: Request | None, cache: Any, rows: int, columns: range, generating: bool
) -> Request:
    """Check that the next forward call, over ``columns``, carries the request on.

    Raises:
        GuardRuntimeError: it does not.
    """
    past, length = columns.start, len(columns)
    if request is None:
        raise GuardRuntimeError(
            "this cache was not filled under the guard: start the request from its prompt"
        )
    if request.done:
        _check_carries_on(request, cache, past, length, generating)
    else:
        if past >= request.prompt_width:
            raise GuardRuntimeError(
                "the cache holds the whole prompt, so the gate would not be read: leave at least "
                "the last token out of the cache"
            )
        if getattr(cache, _STEERED, False):
            if past:
                raise GuardRuntimeError(
                    "this cache holds steered states of an earlier request: send the conversation "
                    "whole, without it"
                )
            setattr(cache, _STEERED, False)  # it was emptied since
    request.cache = cache
    if rows != request.rows:
        if rows % request.rows or not generating or request.done:
            raise GuardRuntimeError(f"the request has {request.rows} rows, the call {rows}")
        request.repeat(rows // request.rows)
    reads_prompt = request.done < request.prompt_width <= columns.stop
    if reads_prompt and min(request.last_prompt) < past:
        raise GuardRuntimeError("a row's prompt ends before this chunk: pad on the left")
    return request


def _check_carries_on(
    request: Request, cache: Any, past: int, length: int, generating: bool
) -> None:
    if past and past != request.done:
        raise GuardRuntimeError(
            "this cache was not filled under the guard: start the request from its prompt"
        )
    if past and request.cache is not cache:
        raise GuardRuntimeError("this cache belongs to another request than the guarded one")
    if past and length > 1 and (request.decided or not generating):
        raise GuardRuntimeError(
            "more than one token on top of a cache: a new turn, a chunk of a prompt or guessed "
            "tokens would bypass the gate. Start from the whole prompt"
        )
    if not past and length != request.done + 1:
        raise GuardRuntimeError("a forward call inside generate does not belong to its request")


def check_prompt_in_parts(config: GuardConfig, request: Request, columns: range) -> None:
    """Refuse prefix caches and chunks of a prompt where they would change what is done."""
    if request.decided or config.steering.positions != "all":
        return
    if columns.start or columns.stop < request.prompt_width:
        raise GuardRuntimeError(
            "this guard steers all positions (`all`) and needs the prompt in one call: leave "
            "prefix caches and prefill_chunk_size out"
        )


def check_length(
    model: Any,
    ids: Tensor | None,
    mask: Tensor,
    markup: ImageMarkup,
    what: str = "the prompt",
    new: int = 0,
) -> None:
    """Refuse a prompt of ids (B, T) with a mask (B, T) that is longer than the model's positions,
    by itself or with ``new`` tokens after it.

    Raises:
        PromptTooLong: it is. ``what`` it is stands in the message.
    """
    limit = positions.room(model)
    if limit is None:
        return
    needed = positions.taken(model, ids, mask, markup)
    if needed > limit:
        raise PromptTooLong(
            f"{what} takes {needed} positions, and the model has {limit}: shorten it, or use fewer "
            "or smaller pictures"
        )
    most = limit - needed + 1  # the last token is never put in
    if new > most:
        raise PromptTooLong(
            f"{what} takes {needed} positions of the model's {limit}, and {new} new tokens do not "
            f"fit behind it: ask for at most {most} (max_new_tokens), or shorten it"
        )


def new_tokens(model: Any, options: Mapping[str, Any], width: int) -> int:
    """How many tokens ``generate`` was told to write at most behind a prompt of ``width`` columns.

    0 where nobody told: not the caller, nor ``max_new_tokens`` of the model's own configuration. A
    ``max_length`` there is what every caller has who says nothing.
    """
    new = _setting(model, options, "max_new_tokens")
    if new is not None:
        return int(new)
    longest = _setting(None, options, "max_length")
    return 0 if longest is None else max(0, int(longest) - width)


def check_rows(request: Request, text: tuple[Tensor, Tensor]) -> None:
    """Refuse text that was given for another number of rows."""
    if len(text[0]) != request.rows:
        raise GuardRuntimeError(
            f"text_input_ids hold {len(text[0])} rows, the prompt has {request.rows}"
        )


def check_adapters(model: Any, attached: list[str]) -> None:
    """Refuse a model whose adapters are not those that were there when the guard was attached.

    ``attached``: what ``adapters`` found then.
    """
    if adapters(model) != attached:
        raise GuardRuntimeError(
            "an adapter was added, removed, switched or scaled since the guard was attached: "
            "the guard belongs to the weights it was calibrated on. Detach it, and attach a "
            "guard that was calibrated with these adapters active"
        )


def adapters(model: Any) -> list[str]:
    """The adapters on a model (PEFT leaves their names on it), which of them work where and how
    much, and where rows of the batch are given one each."""
    names = sorted(adapter_names(model))
    if not names:
        return []
    by_row = [
        place
        for place, module in model.named_modules()
        for hook in module._forward_pre_hooks.values()
        if "adapter_names" in getattr(hook, "keywords", ())  # for the time of one call
    ]
    return [*names, *adapters_at_work(model), *by_row]


def mark_steered(cache: Any) -> None:
    """Remember on a cache that steered states went into it."""
    if cache is not None:
        setattr(cache, _STEERED, True)
