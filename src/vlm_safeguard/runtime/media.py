"""Refuses requests with incomplete or unread pictures, with videos or with sound."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from vlm_safeguard.artifact.config import ImageMarkup
from vlm_safeguard.errors import GuardRuntimeError
from vlm_safeguard.model.picture_inputs import PictureInputs

# What is no picture and no text: by the names of its token and parts of the names of its inputs.
_OTHER = {"video": ("video",), "audio": ("audio", "input_features", "speech")}


def other_tokens(model: Any) -> dict[int, str]:
    """Ids that stand for a video or for sound, as the model's configuration names them, and which
    of the two."""
    found: dict[int, str] = {}
    for what in (*_OTHER, "image"):  # one token may stand for a picture too
        for kind in ("id", "index"):
            token = getattr(model.config, f"{what}_token_{kind}", None)
            if isinstance(token, int):
                found[token] = what
    return {token: what for token, what in found.items() if what != "image"}


def check_only_pictures(
    tokens: Mapping[int, str], ids: Tensor | None, options: Mapping[str, Any]
) -> None:
    """Refuse a request with a video or with sound: the guard was calibrated on pictures, and the
    text-only prompt leaves out nothing else.

    ``tokens`` as from ``other_tokens``, ``ids`` (B, T) of the whole prompt, if it has any.

    Raises:
        GuardRuntimeError: there is such a token among the ids, or such an input.
    """
    found = {what for token, what in tokens.items() if _holds(ids, [token])}
    for name, value in options.items():
        if value is not None and not isinstance(value, bool):
            found |= {what for what, parts in _OTHER.items() if any(p in name for p in parts)}
    if "video" in found:
        raise GuardRuntimeError(
            "requests with videos are not guarded: the guard's gates were set on pictures. Pass "
            "the frames as images"
        )
    if found:
        raise GuardRuntimeError(
            "requests with sound are not guarded: the guard's gates were set on text and pictures. "
            "Pass what is said as text"
        )


def check_not_encoded(options: Mapping[str, Any]) -> None:
    """Refuse pictures, videos or sound that come already encoded, as ``generate`` passes them on to
    the model: nothing tells what was encoded, and the checks of pixels do not see it.

    Raises:
        GuardRuntimeError: there are such inputs.
    """
    if options.get("mm_encoder_outputs") is not None:
        raise GuardRuntimeError(
            "pictures that are already encoded (mm_encoder_outputs) are not guarded: pass their "
            "pixels"
        )


def check_no_unread_picture(
    markup: ImageMarkup, ids: Tensor | None, options: Mapping[str, Any]
) -> None:
    """Refuse a picture that nobody read, under a guard whose gates count on the words in it.

    Raises:
        GuardRuntimeError: there is a picture's token among the ids (B, T), or pixels.
    """
    if _has_pictures(markup, ids, options):
        raise GuardRuntimeError(
            "this guard reads the words in pictures, and they were not read: make the inputs with "
            "guard.prepare(processor, messages), or pass the request as text, with the words of "
            "its pictures, in text_input_ids"
        )


def check_picture_inputs(
    needed: PictureInputs, markup: ImageMarkup, ids: Tensor | None, options: Mapping[str, Any]
) -> None:
    """Refuse a request with pictures that lacks an input which the processor makes for them.

    The model then runs all the same, with other positions or another attention, and its hidden
    states are not those that the gates were set on. Embeddings hold the pictures already: with
    them only the inputs that describe each token are needed.

    Raises:
        GuardRuntimeError: an input is missing.
    """
    if not _has_pictures(markup, ids, options):
        return
    embedded = options.get("inputs_embeds") is not None
    names = needed.of_tokens if embedded else needed.of_tokens | needed.of_pictures
    missing = sorted(name for name in names if options.get(name) is None)
    if missing:
        raise GuardRuntimeError(
            f"a request with pictures comes without {', '.join(missing)}: pass everything that the "
            "processor or guard.prepare(processor, messages) returned"
        )


def _has_pictures(markup: ImageMarkup, ids: Tensor | None, options: Mapping[str, Any]) -> bool:
    return options.get("pixel_values") is not None or _holds(ids, markup.token_ids)


def _holds(ids: Tensor | None, tokens: Iterable[int]) -> bool:
    return ids is not None and any(bool((ids == token).any()) for token in tokens)
