"""Loads a checkpoint and refuses missing, unexpected or wrongly shaped tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import AutoModelForImageTextToText

from vlm_safeguard.errors import ModelError

_NAMED = 3  # tensors that an error names


def read_model(source: str, **options: Any) -> Any:
    """The VLM in a checkpoint, all of whose weights come from there.

    transformers gives weights that a checkpoint lacks random values. What it leaves out on purpose
    is no error: weights tied to others, and what the model's class lists as ignorable.

    Args:
        source: a folder, or a name on the hub.
        options: for ``from_pretrained``.

    Raises:
        ModelError: a tensor is missing, unexpected or of another shape.
    """
    # Other shapes are let through here, so that the error can name their tensors.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, report = AutoModelForImageTextToText.from_pretrained(source, **options)
    _check_complete(source, type(model).__name__, report)
    return model


def _check_complete(source: str, kind: str, report: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that does not fit, by the ``report`` of transformers on loading it."""
    shapes = [
        f"{name} {tuple(found)} instead of {tuple(wanted)}"
        for name, found, wanted in report["mismatched_keys"]
    ]
    wrong = [
        f"{len(names)} {fault} ({_first(names)})"
        for fault, names in (
            ("missing", report["missing_keys"]),
            ("unexpected", report["unexpected_keys"]),
            ("of another shape", shapes),
        )
        if names
    ]
    if wrong:
        raise ModelError(
            f"the weights of {source} do not fit {kind}: tensors {', '.join(wrong)}. The model "
            "would run with random weights or without some of its own: get the checkpoint again, "
            "or the config.json that belongs to it"
        )


def _first(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:_NAMED]) + (", ..." if len(ordered) > _NAMED else "")
