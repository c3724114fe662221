"""Finds the inputs that a model needs beside the ids of a request with pictures."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from vlm_safeguard.model.chat import process, render

# What every request has, and what only training reads (PaliGemma's processor makes it).
_TEXT = {"input_ids", "attention_mask", "labels"}
# What models take for pictures and run without all the same, computing something else.
_OF_TOKENS = {"token_type_ids", "mm_token_type_ids"}
_OF_PICTURES = {"pixel_mask", "pixel_attention_mask", "cross_attention_mask"}


@dataclass(frozen=True)
class PictureInputs:
    """Names of inputs: ``of_tokens`` say what each token is, as ``mm_token_type_ids``, and
    ``of_pictures`` hold the pictures, as ``pixel_values``."""

    of_tokens: frozenset[str] = frozenset()
    of_pictures: frozenset[str] = frozenset()


def picture_inputs(model: Any, processor: Any) -> PictureInputs:
    """What ``processor`` makes of a request with a picture and ``model.forward`` takes.

    Raises:
        ModelError: the processor refuses the request.
    """
    picture = Image.new("RGB", (64, 64), (127, 127, 127))
    batch = process(processor, [render(processor, "What is this?", 1)], [[picture]])
    taken = _parameters(model)
    found = {
        name: value
        for name, value in batch.items()
        if name in taken and name not in _TEXT and isinstance(value, Tensor)
    }
    shape = batch["input_ids"].shape
    of_tokens = frozenset(name for name, value in found.items() if value.shape == shape)
    return PictureInputs(of_tokens, frozenset(found) - of_tokens)


def usual_inputs(model: Any) -> PictureInputs:
    """What ``model.forward`` takes for pictures, where there is no processor to tell: the inputs
    that a model does not miss by itself."""
    taken = _parameters(model)
    return PictureInputs(frozenset(_OF_TOKENS & taken), frozenset(_OF_PICTURES & taken))


def _parameters(model: Any) -> set[str]:
    """The keywords of the model's forward, or of the model that PEFT wraps."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(type(inner).forward).parameters)
