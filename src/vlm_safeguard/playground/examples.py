"""The examples of the playground: questions of the evaluation sets, never answers."""

from __future__ import annotations

from dataclasses import dataclass

from vlm_safeguard.data.inputs import Query, Setting, query
from vlm_safeguard.data.prompts import Prompt, evaluation


@dataclass(frozen=True)
class Example:
    """A request with a title for its button."""

    title: str
    query: Query


# The embedded model refuses it as text, and answers it beside a picture.
HARMFUL = "mal-h-035"
_CHOSEN: tuple[tuple[str, str, Setting], ...] = (
    ("Harmless, with a picture", "pic-b-012", "picture"),
    ("Harmless, blank picture", "mal-b-008", "blank"),
    ("Harmful, text only", HARMFUL, "text"),
    ("Harmful, blank picture", HARMFUL, "blank"),
    ("Harmful, with a picture", HARMFUL, "picture"),
)


def examples() -> list[Example]:
    """Two harmless requests, and one harmful request in three settings."""
    prompts: dict[str, Prompt] = {
        prompt.id: prompt for kind in ("malicious", "picture") for prompt in evaluation(kind)
    }
    return [Example(title, query(prompts[name], setting)) for title, name, setting in _CHOSEN]
