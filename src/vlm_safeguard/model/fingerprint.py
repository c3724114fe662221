"""Computes the digests that identify a model and its processor (weights: see ``weights``)."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from vlm_safeguard.model.chat_template import find_template
from vlm_safeguard.model.loading import DTYPES


def config_digest(model: Any) -> str:
    """SHA-256 of configuration fields that decide the shape of the computation.

    A fixed list of fields is used, so defaults that other versions of transformers add do not
    change it.
    """
    names: tuple[str, ...] = (
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    names += ("num_key_value_heads", "intermediate_size", "vocab_size", "hidden_act")
    names += ("image_size", "patch_size", "image_token_id", "vision_feature_layer")
    names += ("vision_feature_select_strategy", "rope_parameters", "rms_norm_eps")
    whole = model.config
    parts = {"model": whole, "text": whole.get_text_config(decoder=True)}
    parts["vision"] = getattr(whole, "vision_config", None)
    facts = {
        part: {name: getattr(config, name, None) for name in names}
        for part, config in parts.items()
    }
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def dtype_name(model: Any) -> str:
    """The model's dtype as ``load`` names it, or "" if ``load`` does not know it."""
    return next((name for name, dtype in DTYPES.items() if dtype == model.dtype), "")


def template_digest(processor: Any) -> str:
    """SHA-256 of the chat template, the processor's or its tokenizer's."""
    return hashlib.sha256(str(find_template(processor)).encode()).hexdigest()
