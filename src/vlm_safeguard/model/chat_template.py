"""A model's chat template: where it is kept, what content it takes, and the text it makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from vlm_safeguard.errors import ModelError

Parts = Sequence[str | None]  # texts in order, None for a picture
_PROBE = "wxyz probe wxyz"


def find_template(processor: Any) -> str | None:
    """The chat template of a processor, else that of its tokenizer; None if neither has one.

    Of several named templates it is the one called "default".
    """
    found = _kept(processor)
    return None if found is None else found[1]


def templated(processor: Any, turns: Sequence[tuple[str, Parts]]) -> str:
    """Turns through the chat template, ready for an answer: roles and parts.

    A template that takes no list of parts gets a text, in which the processor's own token and a
    newline stand for a picture.

    Raises:
        ModelError: there is no template, or it fails. The message says which template and why.
    """
    kept = _kept(processor)
    if kept is None:
        raise ModelError(
            f"{type(processor).__name__} and its tokenizer have no chat template: set "
            "processor.chat_template to the model's, and save the processor with it"
        )
    owner, template = kept
    try:
        names = processor.tokenizer.special_tokens_map
        as_parts = _takes_parts(template, tuple((key, str(names[key])) for key in sorted(names)))
        messages = [
            {"role": role, "content": _as_parts(parts) if as_parts else _as_text(processor, parts)}
            for role, parts in turns
        ]
        return str(
            processor.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=True, tokenize=False
            )
        )
    except Exception as error:  # what a template does is up to it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        asked = ", ".join(f"{role}: {_counted(parts)}" for role, parts in turns)
        raise ModelError(
            f"the chat template of the {owner} ({template[:40]!r}...) fails on a conversation of "
            f"{asked}: {reason}"
        ) from error


def _kept(processor: Any) -> tuple[str, str] | None:
    """Who keeps the chat template, and the template."""
    for owner, holder in (("processor", processor), ("tokenizer", _tokenizer(processor))):
        found = getattr(holder, "chat_template", None)
        if isinstance(found, Mapping):
            found = found.get("default")
        if found is not None:
            return owner, str(found)
    return None


def _tokenizer(processor: Any) -> Any:
    return getattr(processor, "tokenizer", None)


@lru_cache
def _takes_parts(template: str, special_tokens: tuple[tuple[str, str], ...]) -> bool:
    """Whether a template takes a list of parts as the content of a message, and not a text alone.

    Some that take a text fail on a list, some write nothing of it, and some write it as Python
    does.

    Raises:
        ValueError: it writes neither. What the template itself raises is passed on.
    """

    def said(content: Any) -> str:
        messages = [{"role": "user", "content": content}]
        written, _ = render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=True, **dict(special_tokens)
        )
        return str(written[0])

    failed: Exception = ValueError("it writes the text of no message")
    try:
        text = said(_as_parts([_PROBE]))
        if _PROBE in text and "'type'" not in text and '"type"' not in text:
            return True
    except Exception as error:  # it may want a text
        failed = error
    try:
        text = said(_PROBE)
    except Exception:  # it wants neither
        raise failed from None
    if _PROBE not in text:
        raise failed
    return False


def _as_parts(parts: Parts) -> list[dict[str, str]]:
    return [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]


def _as_text(processor: Any, parts: Parts) -> str:
    """A message as one text. Raises ``ValueError`` if the processor has no token for pictures."""
    names = ("boi_token", "image_token")
    tokens = [getattr(processor, name, None) for name in names]
    token = next((str(found) for found in tokens if found), None)
    if token is None and None in parts:
        raise ValueError(
            "it takes text alone, and the processor names no token that stands for a picture: set "
            "processor.image_token"
        )
    return "".join(f"{token}\n" if part is None else part for part in parts)


def _counted(parts: Parts) -> str:
    pictures = sum(part is None for part in parts)
    return f"text and {pictures} pictures" if pictures else "text"
