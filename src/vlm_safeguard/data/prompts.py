"""Loads the bundled prompts: anchors, calibration, evaluation. Questions only.

Every file's SHA-256 stands in ``data/digests.json`` and is checked before use, so that a guard or
a result can name exactly the data it rests on. The three groups are pairwise disjoint, near
duplicates included.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any, Literal

from vlm_safeguard.errors import DataError

Label = Literal["harmful", "harmless"]
Split = Literal["fit", "bound", "held"]
SPLITS: tuple[Split, ...] = ("fit", "bound", "held")
SLOT = "[QUESTION]"


@dataclass(frozen=True)
class Prompt:
    """One request. ``cluster`` names the question behind it where templates repeat it.

    ``picture`` is the description of the picture it needs (see ``pictures.draw``), or None for a
    request that stands on its own.
    """

    id: str
    prompt: str
    label: Label
    form: Literal["plain", "jailbreak", "picture"]
    intent: str
    cluster: str
    split: str = ""
    picture: tuple[tuple[str, str], ...] | None = None

    @property
    def harmful(self) -> bool:
        return self.label == "harmful"

    @property
    def speaks_for_itself(self) -> bool:
        """Whether the label can be told from the words, without what is written in a picture."""
        return dict(self.picture or ()).get("kind") != "text"


@dataclass(frozen=True)
class AnchorPair:
    """A harmful and a harmless question of the same form."""

    id: str
    harmful: str
    harmless: str


@lru_cache
def digests() -> dict[str, str]:
    """SHA-256 of every data file, by name."""
    found: dict[str, str] = json.loads(_bytes("digests.json"))
    return found


def anchors() -> list[AnchorPair]:
    """The anchor pairs for the safety steering directions."""
    return [AnchorPair(**row) for row in _rows("anchors.jsonl")]


def calibration(split: Split) -> list[Prompt]:
    """Calibration prompts of one part: plain, inside jailbreak wrappers, and about a picture.

    Wrappers go round every fourth plain question of both labels, so that a wrapper by itself says
    nothing about harm. ``fit`` chooses, ``bound`` (harmless ones alone) is for thresholds with
    a guarantee, and ``held`` proves.
    """
    plain: list[Prompt] = []
    pictured: list[Prompt] = []
    for row in _rows("calibration.jsonl"):
        if row["split"] == split:
            (pictured if row["form"] == "picture" else plain).append(_prompt(row))
    wrapped = []
    templates = _rows("calibration_templates.jsonl")
    for label in ("harmful", "harmless"):
        for n, prompt in enumerate([p for p in plain if p.label == label][::4]):
            wrapped.append(_wrap(prompt, templates[n % len(templates)]))
    return plain + wrapped + pictured


def evaluation(kind: Literal["malicious", "jailbreak", "picture"]) -> list[Prompt]:
    """One evaluation set: 100 harmful requests and 100 harmless ones."""
    if kind == "jailbreak":
        questions = [_prompt(row) for row in _rows("eval_jailbreak_questions.jsonl")]
        templates = _rows("eval_jailbreak_templates.jsonl")
        return [_wrap(question, template) for template in templates for question in questions]
    return [_prompt(row) for row in _rows(f"eval_{kind}.jsonl")]


def _prompt(row: dict[str, Any]) -> Prompt:
    picture = row.get("picture")
    return Prompt(
        id=row["id"],
        prompt=row["prompt"],
        label=row["label"],
        form="picture" if picture else "plain",
        intent=row["intent"],
        cluster=row["id"],
        split=row.get("split", ""),
        picture=tuple(sorted(picture.items())) if picture else None,
    )


def _wrap(question: Prompt, template: dict[str, Any]) -> Prompt:
    return Prompt(
        id=f"{question.id}@{template['id']}",
        prompt=template["prompt"].replace(SLOT, question.prompt),
        label=question.label,
        form="jailbreak",
        intent=question.intent,
        cluster=question.id,
        split=question.split,
    )


def _bytes(name: str) -> bytes:
    try:
        return (files("vlm_safeguard") / "data" / name).read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"the package's data file {name} is missing: reinstall it") from error


@lru_cache
def _rows(name: str) -> list[dict[str, Any]]:
    data = _bytes(name)
    if hashlib.sha256(data).hexdigest() != digests().get(name):
        raise DataError(f"the package's data file {name} was changed: reinstall vlm-safeguard")
    return [json.loads(line) for line in data.decode("utf-8").splitlines() if line.strip()]
