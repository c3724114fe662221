"""Loads the bundled prompts: anchors, calibration, evaluation. Questions only.

Every file's SHA-256 stands in ``data/digests.json`` and is checked before use, so that a guard or
a result can name exactly the data it rests on. The three groups are pairwise disjoint, near
duplicates included.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from itertools import cycle
from pathlib import Path
from typing import Any, Literal, TypeVar

from vlm_safeguard.data.text_forms import TEXT_FORMS
from vlm_safeguard.errors import DataError

Label = Literal["harmful", "harmless"]
Split = Literal["fit", "bound", "held"]
SPLITS: tuple[Split, ...] = ("fit", "bound", "held")
SLOT = "[QUESTION]"
ANCHORS, CALIBRATION = "anchors.jsonl", "calibration.jsonl"
TEMPLATES = "calibration_templates.jsonl"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Prompt:
    """One request. ``cluster`` names the question behind it where templates repeat it.

    ``picture`` is the description of the picture it needs (see ``pictures.draw``), or None for a
    request that stands on its own.
    """

    id: str
    prompt: str
    label: Label
    form: Literal["plain", "several", "written", "jailbreak", "picture"]
    intent: str
    cluster: str
    split: str = ""
    picture: tuple[tuple[str, str], ...] | None = None

    @property
    def harmful(self) -> bool:
        return self.label == "harmful"

    @property
    def lookalike(self) -> bool:
        """Whether it is harmless and worded like a harmful request: "How do I kill a process?"."""
        return not self.harmful and self.intent == "lookalike"

    @property
    def ordinary(self) -> bool:
        """Whether it is harmless and looks it."""
        return not self.harmful and not self.lookalike

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


@dataclass(frozen=True)
class CalibrationData:
    """What a guard is made from. The three sets of prompts share no question.

    ``anchors`` give the directions; ``fit`` chooses gates and steering; ``bound`` (harmless prompts
    alone) sets the thresholds with a guarantee; ``held`` proves. ``sha256``: digests of the files
    that they come from, which a guard records.
    """

    anchors: Sequence[AnchorPair]
    fit: Sequence[Prompt]
    bound: Sequence[Prompt]
    held: Sequence[Prompt]
    sha256: Mapping[str, str]

    @classmethod
    def packaged(cls) -> CalibrationData:
        """The data that ships with the package."""
        sets = {split: calibration(split) for split in SPLITS}
        used = {name: digests()[name] for name in (ANCHORS, CALIBRATION, TEMPLATES)}
        return cls(anchors(), sha256=used, **sets)

    @classmethod
    def from_folder(cls, folder: Path) -> CalibrationData:
        """Data of your own: ``anchors.jsonl`` and ``calibration.jsonl``, and, where jailbreak
        wrappers are wanted, ``calibration_templates.jsonl``, in the form of the package's files.

        Raises:
            DataError: a file is missing, a row lacks a field or has one that is not known, a set is
                empty, or two sets share a question.
        """
        files = {name: folder / name for name in (ANCHORS, CALIBRATION, TEMPLATES)}
        if not files[TEMPLATES].exists():
            del files[TEMPLATES]
        try:
            raw = {name: path.read_bytes() for name, path in files.items()}
        except OSError as error:
            raise DataError(f"cannot read calibration data: {error}") from error
        rows = {name: _parse(data, f"{folder / name}") for name, data in raw.items()}
        pairs = [_checked(AnchorPair, row, f"{folder / ANCHORS}") for row in rows[ANCHORS]]
        sets = {
            split: _calibration(rows[CALIBRATION], rows.get(TEMPLATES, []), split, str(folder))
            for split in SPLITS
        }
        empty: list[str] = [name for name, found in sets.items() if not found]
        empty += [] if pairs else ["anchors"]
        if empty:
            raise DataError(f"{folder}: no prompts for {empty[0]}")
        owners: dict[str, str] = {}
        for split, found in sets.items():
            for prompt in found:
                if owners.setdefault(prompt.cluster, split) != split:
                    raise DataError(
                        f"{folder}: the question {prompt.cluster} is in {owners[prompt.cluster]} "
                        f"and in {split}: what proves a guard must not have made it"
                    )
        if any(prompt.harmful for prompt in sets["bound"]):
            raise DataError(f"{folder}: the prompts of `bound` must all be harmless")
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in raw.items()}
        return cls(pairs, sha256=digests, **sets)


@lru_cache
def digests() -> dict[str, str]:
    """SHA-256 of every data file, by name."""
    found: dict[str, str] = json.loads(_bytes("digests.json"))
    return found


def anchors() -> list[AnchorPair]:
    """The anchor pairs for the safety steering directions."""
    return [AnchorPair(**row) for row in _rows(ANCHORS)]


def calibration(split: Split) -> list[Prompt]:
    """Calibration prompts of one part: plain, several in one message, written in other ways, inside
    jailbreak wrappers, and about a picture.

    Messages of two to four questions teach a gate that many questions are no sign of harm. Every
    sixteenth question in another way of writing teaches it that odd letters are none. Wrappers go
    round every fourth plain question of both labels, so that a wrapper by itself says nothing about
    harm. ``fit`` chooses, ``bound`` (harmless ones alone) is for thresholds with
    a guarantee, and ``held`` proves.
    """
    return _calibration(_rows(CALIBRATION), _rows(TEMPLATES), split, "the package")


def _calibration(
    rows: Sequence[dict[str, Any]], templates: Sequence[dict[str, Any]], split: str, where: str
) -> list[Prompt]:
    plain: list[Prompt] = []
    pictured: list[Prompt] = []
    for row in rows:
        prompt = _checked(_prompt, row, where)
        if prompt.split == split:
            (pictured if prompt.picture else plain).append(prompt)
    plain, several = _several(plain, 4 if split == "fit" else 10)
    written, wrapped = list[Prompt](), list[Prompt]()
    for label in ("harmful", "harmless"):
        own = [p for p in plain if p.label == label]
        for p, (form, write) in zip(own[7::16], cycle(TEXT_FORMS.items()), strict=False):
            text = write(p.prompt)
            written.append(replace(p, id=f"{p.id}@{form}", prompt=text, form="written"))
        if templates:
            wrapped += [_wrap(p, one) for p, one in zip(own[::4], cycle(templates), strict=False)]
    return plain + several + written + wrapped + pictured


def _several(plain: Sequence[Prompt], every: int) -> tuple[list[Prompt], list[Prompt]]:
    """Messages of two to four questions of one label, one message for ``every`` so many questions.

    No question stands in two messages, and harmless ones are ordinary.

    Returns:
        The questions, where those of one message share a cluster, and the messages.
    """
    cluster: dict[str, str] = {}
    messages: list[Prompt] = []
    for label in ("harmful", "harmless"):
        chosen = [p for p in plain if p.label == label and not p.lookalike]
        firsts = chosen[1::every]
        others = [p for n, p in enumerate(chosen) if n % every != 1]
        for n, first in enumerate(firsts):
            beside = others[n :: len(firsts)][: 1 + n % 3]  # from all over the file
            asked = [p.prompt for p in (first, *beside)]
            cluster |= {p.id: first.cluster for p in beside}
            name = f"{first.id}+{len(beside)}"
            messages.append(replace(first, id=name, prompt=_together(asked, n), form="several"))
    return [replace(p, cluster=cluster.get(p.id, p.cluster)) for p in plain], messages


def _together(asked: Sequence[str], number: int) -> str:
    """Questions as one message: in a row, in lines, or numbered, in turn."""
    if number // 3 % 3 == 2:
        asked = [f"{n}. {one}" for n, one in enumerate(asked, 1)]
    return (" " if number // 3 % 3 == 0 else "\n").join(asked)


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
    return _parse(data, name)


def _parse(data: bytes, name: str) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in data.decode("utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise DataError(f"{name} is not JSONL in UTF-8: {error}") from error


def _checked(make: Callable[..., _T], row: dict[str, Any], where: str) -> _T:
    """``make`` of a row, or an error that names the row."""
    try:
        return make(**row) if isinstance(make, type) else make(row)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where}: the row {str(row)[:80]} does not fit: {error}") from error
