"""Finds the inputs that a model needs beside the ids of a request with pictures."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from vlm_safeguard.model.chat import process, render

# What every request has, and what has checks of its own.
_TEXT = {"input_ids", "attention_mask"}


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


def _parameters(model: Any) -> set[str]:
    """The keywords of the model's forward, or of the model that PEFT wraps."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(type(inner).forward).parameters)
