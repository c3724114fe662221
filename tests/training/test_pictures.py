"""The pictures: labels of easy-VQA, the list of concepts, and emoji of pinned packages."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from training import pictures
from training.pictures import COLOURS, IGNORE, SHAPES


def label(*said: tuple[str, str]) -> tuple[str | None, str | None]:
    """Shape and colour of a picture of which this was asked and answered."""
    questions, answers = zip(*said, strict=True)
    [(shape, colour)] = pictures.label_shapes(questions, answers, [0] * len(said)).values()
    return (
        None if shape == IGNORE else SHAPES[shape],
        None if colour == IGNORE else COLOURS[colour],
    )


@pytest.mark.parametrize(
    ("question", "answer", "shape"),
    [
        ("is there a circle?", "yes", "circle"),
        ("is there a circle?", "no", None),
        ("is there not a circle?", "no", "circle"),
        ("is there not a circle?", "yes", None),
        ("is no circle present?", "no", "circle"),
        ("is no circle present?", "yes", None),
        ("what color is the circle?", "red", "circle"),
        ("what shape is present?", "circle", "circle"),
    ],
)
def test_the_shape_that_an_answer_tells(question: str, answer: str, shape: str | None) -> None:
    assert label((question, answer))[0] == shape


def test_the_one_shape_that_is_left_is_the_shape() -> None:
    denied = [("is there a circle?", "no"), ("is there not a triangle?", "yes")]
    assert label(*denied) == ("rectangle", None)
    assert label(*denied, ("is a teal shape present?", "yes")) == ("rectangle", "teal")


def test_answers_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="contradict"):
        label(("is there a circle?", "yes"), ("is no circle present?", "yes"))
    with pytest.raises(ValueError, match="contradict"):
        label(("is there a circle?", "yes"), ("is there a triangle?", "yes"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("animal | cat\n", r":1: expected 'category \| name \| keys'"),
        ("# list\nanimal | | cat\n", ":2: expected"),
        ("animal | cat | cat\nanimal | cat | cat-face\n", "named twice"),
    ],
)
def test_a_wrong_list_of_concepts_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "concepts.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason):
        pictures.load_concepts(path)


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("whole")

    def torn(target: Path) -> None:
        target.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pictures.write_via_rename(path, torn)
    assert path.read_text() == "whole" and list(tmp_path.iterdir()) == [path]


# -- emoji ---------------------------------------------------------------------------------------

HALF = '<rect width="16" height="8" fill="#f00" fill-opacity="0.5"/>'  # the upper half, half red
ICONS = {
    "icons": {"cat": {"body": HALF}, "robot-face": {"body": HALF}},
    "aliases": {
        "kitty": {"parent": "cat"},
        "turned": {"parent": "cat", "rotate": 1},
        "round": {"parent": "round"},
    },
}


def test_icons_are_found_under_former_names_and_plain_aliases() -> None:
    cat, robot = ICONS["icons"].values()
    found = {key: pictures._find_icon(ICONS, key) for key in ("cat", "kitty", "robot")}
    assert found == {"cat": cat, "kitty": cat, "robot": robot}
    for key in ("turned", "round", "dog"):
        assert pictures._find_icon(ICONS, key) is None


def test_an_icon_is_drawn_with_premultiplied_colours() -> None:
    rgba = pictures._rasterise(ICONS, ICONS["icons"]["cat"])
    assert rgba.shape == (pictures.SIDE, pictures.SIDE, 4) and rgba.dtype == np.uint8
    upper, lower = rgba[20, 40].tolist(), rgba[70, 40].tolist()
    assert lower == [0, 0, 0, 0]
    assert upper[1:3] == [0, 0] and upper[0] == upper[3] and 127 <= upper[3] <= 128


def packed(cache: Path, artist: pictures.Artist, licence: str) -> pictures.Artist:
    """Put a package with ``ICONS`` into the cache; the artist with its digest."""
    target = cache / artist.tarball
    files = {"info.json": {"license": {"spdx": licence}}, "icons.json": ICONS}
    with tarfile.open(target, "w:gz") as archive:
        for name, content in files.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return dataclasses.replace(artist, sha256=pictures._sha256(target))


@pytest.fixture
def artists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[pictures.Artist]:
    """The artists, with packages of one icon in the cache ``tmp_path``."""
    found = [packed(tmp_path, artist, artist.licence) for artist in pictures.ARTISTS]
    monkeypatch.setattr(pictures, "ARTISTS", tuple(found))
    return found


def test_emoji_are_drawn_once_and_the_held_out_artist_is_apart(
    artists: list[pictures.Artist], tmp_path: Path
) -> None:
    concepts = [pictures.Concept("animal", "cat", ("cat",))]
    emoji = pictures.load_emoji(concepts, tmp_path)
    held_out, training = emoji.of(held_out=True), emoji.of(held_out=False)
    assert (len(held_out.rgba), len(training.rgba)) == (1, len(artists) - 1)
    assert artists[int(held_out.artist)].held_out
    for artist in artists:
        (tmp_path / artist.tarball).unlink()
    assert torch.equal(pictures.load_emoji(concepts, tmp_path).rgba, emoji.rgba)


def test_a_concept_that_an_artist_lacks_is_refused(
    artists: list[pictures.Artist], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"dog: drawn only by \[\]"):
        pictures.load_emoji([pictures.Concept("animal", "dog", ("dog",))], tmp_path)


def test_another_package_than_the_pinned_one_is_refused(
    artists: list[pictures.Artist], tmp_path: Path
) -> None:
    (tmp_path / artists[0].tarball).write_bytes(b"another")
    with pytest.raises(ValueError, match=r"SHA-256 differs from the pinned one; delete it"):
        pictures.fetch(artists[0], tmp_path)


def test_another_licence_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = packed(tmp_path, pictures.ARTISTS[0], "proprietary")
    monkeypatch.setattr(pictures, "ARTISTS", (first,))
    with pytest.raises(ValueError, match=r"licence is proprietary, not Apache-2\.0"):
        pictures.load_emoji([pictures.Concept("animal", "cat", ("cat",))], tmp_path)


# -- augmentation --------------------------------------------------------------------------------


def test_augmented_pictures_are_pictures_and_the_seeds() -> None:
    rgba = torch.randint(0, 256, (3, 4, pictures.SIDE, pictures.SIDE), dtype=torch.uint8)
    rgba[:, :3] = torch.minimum(rgba[:, :3], rgba[:, 3:])

    def drawn(seed: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [
            pictures.augmented_emoji(rgba, generator),
            pictures.augmented_shapes(rgba[:, :3], generator),
            pictures.blanks(3, generator),
        ]

    for one, same, other in zip(drawn(0), drawn(0), drawn(1), strict=True):
        assert one.shape == (3, 3, pictures.SIDE, pictures.SIDE)
        assert one.min() >= 0 and one.max() <= 1
        assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_moved_shape_keeps_its_colours() -> None:
    rgb = torch.full((4, 3, pictures.SIDE, pictures.SIDE), 200, dtype=torch.uint8)
    rgb[:, 0, 30:60, 30:60] = 40
    moved = pictures.augmented_shapes(rgb, torch.Generator().manual_seed(0))
    for corner in (moved[:, :, 0, 0], moved[:, :, -1, -1]):
        torch.testing.assert_close(corner, torch.full((4, 3), 200 / 255))
    torch.testing.assert_close(moved[:, 0].amin((1, 2)), torch.full((4,), 40 / 255))
