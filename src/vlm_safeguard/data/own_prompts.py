"""Calibration data from files of one's own, added to ours or alone.

Near copies of a question stay together, so that no question that tests the guard has made it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vlm_safeguard.data.near_copies import clusters
from vlm_safeguard.data.prompt_files import (
    MAX_BYTES,
    PromptFile,
    PromptRow,
    read_pairs,
    read_prompts,
)
from vlm_safeguard.data.prompts import ANCHORS, AnchorPair, CalibrationData, Label, Prompt
from vlm_safeguard.errors import DataError
from vlm_safeguard.utils.files import read_limited

FIT, HELD = 40, 20  # questions of each label at least, without ours
PAIRS = 64  # anchors at least: each gives one safety direction at most
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class OwnFiles:
    """Files of one's own.

    Attributes:
        harmful, harmless: prompts, see ``prompt_files.read_prompts``.
        anchors: pairs of a harmful and a harmless question of the same form; None: ours.
        pictures: folder of the pictures that prompts name. Prompts that name none get them in turn.
        alone: without our prompts, and with ``anchors`` without our anchors.
    """

    harmful: Path
    harmless: Path
    anchors: Path | None = None
    pictures: Path | None = None
    alone: bool = False


def own_data(files: OwnFiles, bound: int) -> CalibrationData:
    """Calibration data from files of one's own; their digests are recorded, and no prompt.

    Args:
        files: what to read.
        bound: harmless questions that the thresholds need at least.

    Raises:
        DataError: a file cannot be read, a request stands in both files, a picture is missing, or
            there are too few questions.
    """
    ours = CalibrationData.packaged()
    sha256 = {} if files.alone else dict(ours.sha256)
    pairs: list[tuple[str, str]] = []
    anchors = list(ours.anchors)
    if files.anchors is not None:
        pairs, sha256["own-anchors"] = read_pairs(files.anchors)
        own = [AnchorPair(f"own-{n}", *pair) for n, pair in enumerate(pairs)]
        anchors = own if files.alone else anchors + own
    elif files.alone:
        sha256[ANCHORS] = ours.sha256[ANCHORS]
    if len(anchors) < PAIRS:
        raise DataError(
            f"{files.anchors} has {len(anchors)} pairs, and at least {PAIRS} are needed, as "
            "each gives one safety direction at most: add some, or add them to ours"
        )
    pictures = _Pictures(files.pictures)
    prompts: list[Prompt] = []
    labels: tuple[tuple[Label, Path], ...]
    labels = (("harmful", files.harmful), ("harmless", files.harmless))
    for label, path in labels:
        found = read_prompts(path)
        sha256[f"own-{label}"] = found.sha256
        prompts += _prompts(found, label, path, pictures)
    if files.pictures is not None:
        sha256["own-pictures"] = pictures.digest()
    _check_labels(prompts, files)
    known = [] if files.alone else [*ours.fit, *ours.bound, *ours.held]
    prompts = _split(prompts, known, pairs, bound if files.alone else 0)
    if files.alone:
        _check_sizes(prompts, files, bound)
    sets = {
        split: [*(p for p in known if p.split == split), *(p for p in prompts if p.split == split)]
        for split in ("fit", "bound", "held")
    }
    return CalibrationData(anchors, sha256=sha256, **sets)


class _Pictures:
    """The pictures of a folder."""

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._names, self._given = folder, list[str](), 0
        if folder is None:
            return
        try:
            entries = sorted(folder.iterdir())
        except OSError as error:
            raise DataError(f"cannot read the pictures {folder}: {error.strerror}") from error
        self._names = [path.name for path in entries if path.suffix.lower() in PICTURES]
        if not self._names:
            raise DataError(f"{folder} holds no picture: put {', '.join(PICTURES)} files there")

    def of(self, row: PromptRow, path: Path) -> tuple[tuple[str, str], ...] | None:
        """The description of a prompt's picture: that which it names, or the next one."""
        if not row.picture and self._folder is None:
            return None
        if row.picture and row.picture not in self._names:
            where = self._folder or "the pictures, for no folder is given (--pictures)"
            raise DataError(f"{path} names the picture {row.picture!r}, which is not in {where}")
        name = row.picture or self._names[self._given % len(self._names)]
        self._given += not row.picture
        return (("kind", "file"), ("value", str(Path(self._folder or "", name))))

    def digest(self) -> str:
        """SHA-256 of the names and contents of all pictures."""
        found = hashlib.sha256()
        for name in self._names:
            path = Path(self._folder or "", name)
            try:
                content = read_limited(path, MAX_BYTES)
            except OSError as error:
                raise DataError(f"cannot read the picture {path}: {error.strerror}") from error
            found.update(f"{name}\n{hashlib.sha256(content).hexdigest()}\n".encode())
        return found.hexdigest()


def _prompts(found: PromptFile, label: Label, path: Path, pictures: _Pictures) -> list[Prompt]:
    """The prompts of a file, not yet split. One that names a picture is about it."""
    return [
        Prompt(
            id=f"own-{label}-{number}",
            prompt=row.prompt,
            label=label,
            form="picture" if row.picture else "plain",
            intent="own",
            cluster=row.question,
            picture=pictures.of(row, path),
        )
        for number, row in enumerate(found.rows, 1)
    ]


def _check_labels(prompts: Sequence[Prompt], files: OwnFiles) -> None:
    """Refuse a request that stands in both files."""
    said: dict[tuple[str, str], Prompt] = {}
    for prompt in prompts:
        named = str(prompt.picture) if prompt.form == "picture" else ""
        other = said.setdefault((prompt.prompt.casefold(), named), prompt)
        if other.label != prompt.label:
            raise DataError(
                f"prompt {other.id.rsplit('-', 1)[1]} of {files.harmful} is also prompt "
                f"{prompt.id.rsplit('-', 1)[1]} of {files.harmless}: leave it in one of them"
            )


def _split(
    prompts: Sequence[Prompt],
    known: Sequence[Prompt],
    pairs: Sequence[tuple[str, str]],
    bound: int,
) -> list[Prompt]:
    """The prompts with a cluster and a split each.

    A cluster that holds one of our prompts goes where that is, one that holds an anchor to ``fit``.
    The others are put in an order that follows from their words. A fifth of them goes to ``held``,
    of harmless ones two fifths to ``bound``, and the rest to ``fit``. With ``bound``, these are
    fifths of what is left when each has the least it needs.
    """
    said = [text for pair in pairs for text in pair]
    texts = [*said, *(p.prompt for p in known), *(p.prompt for p in prompts)]
    unnamed = [""] * (len(texts) - len(prompts))
    numbers = clusters(texts, [*unnamed, *(p.cluster for p in prompts)])
    own = numbers[len(unnamed) :]
    places = dict(zip(numbers[len(said) :], (p.split for p in known), strict=False))
    places |= dict.fromkeys(numbers[: len(said)], "fit")
    free: dict[int, list[Prompt]] = {}
    for prompt, number in zip(prompts, own, strict=True):
        if number not in places:
            free.setdefault(number, []).append(prompt)
    ranked = sorted(free, key=lambda n: hashlib.sha256(free[n][0].prompt.encode()).digest())
    for label in ("harmful", "harmless"):
        # A cluster of both labels counts as harmful: what sets the thresholds is harmless alone.
        chosen = [n for n in ranked if any(p.harmful for p in free[n]) == (label == "harmful")]
        most = bound if label == "harmless" else 0
        spare = max(0, len(chosen) - (FIT + most + HELD if bound else 0))
        held = spare // 5 + (HELD if bound else 0)
        middle = held + (most + spare * 2 // 5 if label == "harmless" else 0)
        for place, number in enumerate(chosen):
            places[number] = "held" if place < held else "bound" if place < middle else "fit"
    return [
        replace(
            prompt,
            cluster=f"own-{number}",
            split="fit" if prompt.harmful and places[number] == "bound" else places[number],
        )
        for prompt, number in zip(prompts, own, strict=True)
    ]


def _check_sizes(prompts: Sequence[Prompt], files: OwnFiles, bound: int) -> None:
    """Refuse sets that are too small to stand alone; the message says what each is for."""
    needed: tuple[tuple[Label, Path, dict[str, int]], ...]
    needed = (
        ("harmful", files.harmful, {"fit": FIT, "held": HELD}),
        ("harmless", files.harmless, {"fit": FIT, "bound": bound, "held": HELD}),
    )
    purposes = {
        "fit": "to fit gates and choose the steering",
        "bound": "to set the thresholds within the false-positive budget",
        "held": "to test the guard",
    }
    for label, path, least in needed:
        chosen = [p for p in prompts if p.label == label]
        found = {split: {p.cluster for p in chosen if p.split == split} for split in least}
        if any(len(found[split]) < count for split, count in least.items()):
            parts = ", ".join(f"{count} {purposes[split]}" for split, count in least.items())
            raise DataError(
                f"{path} has {len({p.cluster for p in chosen})} {label} questions (near copies "
                f"count as one), and at least {sum(least.values())} are needed: {parts}. Add some, "
                "or add them to ours"
            )
