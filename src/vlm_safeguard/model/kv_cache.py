"""Finds the KV cache among a call's arguments, under any name that transformers uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from vlm_safeguard.errors import GuardRuntimeError

# The names under which a model takes a cache, its own first: from transformers 5.24 on `cache`,
# with the names of before as others. Before that, `cache` is what a packed call comes with.
NAMES: tuple[str, ...] = ("past_key_values", "cache_params")
if "cache" in BaseModelOutputWithPast.__dataclass_fields__:
    NAMES = ("cache", *NAMES)
NAME = NAMES[0]


def cache_given(options: Mapping[str, Any]) -> Any:
    """The cache in the keywords of a call; None without.

    Raises:
        GuardRuntimeError: there are two, and the model would use one of them, or it is of a kind
            that holds several requests in one row.
    """
    given = [options[name] for name in NAMES if name in options]
    if len(given) > 1:
        raise GuardRuntimeError(f"the cache is given under two names: pass it as {NAME} alone")
    cache = given[0] if given else None
    if not isinstance(cache, Cache | None):
        raise GuardRuntimeError(
            f"a cache of kind {type(cache).__name__} is not guarded: pass a Cache of transformers"
        )
    return cache


def cache_of(output: Any) -> Any:
    """The cache in what a forward call returned, a ``ModelOutput`` or a tuple; None without."""
    if isinstance(output, tuple):
        return next((part for part in output if hasattr(part, "get_seq_length")), None)
    return getattr(output, NAME, None)
