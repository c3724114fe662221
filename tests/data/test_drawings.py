"""The pictures that the package draws: all there, all different, the same every time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vlm_safeguard
from vlm_safeguard.data.drawings import OBJECTS, blank, draw, draw_object, draw_text, noise
from vlm_safeguard.errors import ImageError

DATA = Path(vlm_safeguard.__path__[0]) / "data"
EXPECTED = [
    "knife",
    "bottle",
    "key",
    "lock",
    "car",
    "house",
    "phone",
    "card",
    "pill",
    "laptop",
    "envelope",
    "person",
    "dog",
    "cat",
    "tree",
    "sun",
    "clock",
    "cup",
    "book",
    "camera",
    "bicycle",
    "hammer",
    "scissors",
    "rope",
    "fire",
    "money",
    "syringe",
    "bomb",
    "gun",
    "mushroom",
    "flower",
    "fish",
    "boat",
    "plane",
    "train",
    "umbrella",
    "chair",
    "lamp",
    "apple",
    "star",
]


def specs() -> list[dict[str, str]]:
    rows = [
        json.loads(line)
        for path in sorted(DATA.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    return [row["picture"] for row in rows if row.get("picture")]


def test_the_forty_objects() -> None:
    assert sorted(OBJECTS) == sorted(EXPECTED)
    assert len(OBJECTS) == 40


@pytest.mark.parametrize("name", OBJECTS)
def test_object_is_drawn_the_same_twice(name: str) -> None:
    image = draw_object(name)
    assert (image.mode, image.size) == ("RGB", (224, 224))
    assert image.tobytes() == draw_object(name).tobytes()
    pixels = np.asarray(image).astype(int)
    drawn = (np.abs(pixels - (245, 245, 240)).max(axis=-1) > 12).mean()
    assert 0.05 < drawn < 0.8


def test_objects_differ_clearly() -> None:
    pictures = {name: np.asarray(draw_object(name, 64)).astype(int) for name in OBJECTS}
    for index, first in enumerate(OBJECTS):
        for second in OBJECTS[index + 1 :]:
            assert np.abs(pictures[first] - pictures[second]).mean() > 5, (first, second)


@pytest.mark.parametrize("size", [8, 64, 336])
def test_sizes(size: int) -> None:
    assert draw_object("star", size).size == (size, size)
    assert blank(size).size == (size, size)
    assert noise(1, size).size == (size, size)


def test_every_picture_of_the_bundled_prompts_draws() -> None:
    found = specs()
    assert found
    for spec in found:
        assert draw(spec).size == (224, 224)


def test_text_is_black_on_white_and_inside_the_picture() -> None:
    pixels = np.asarray(draw_text("plant a tree in the garden"))
    assert (pixels[..., 0] == pixels[..., 1]).all()
    assert (pixels.min(), pixels.max()) == (0, 255)
    border = np.concatenate([pixels[:6], pixels[-6:], pixels[:, :6].swapaxes(0, 1)])
    assert (border == 255).all()
    assert draw_text("one two").tobytes() == draw_text("one two").tobytes()
    assert draw_text("one two").tobytes() != draw_text("one too").tobytes()


def test_short_text_is_larger_than_long_text() -> None:
    def height(text: str) -> int:
        rows = np.flatnonzero((np.asarray(draw_text(text)) < 128).any(axis=(1, 2)))
        return int(rows[-1] - rows[0])

    assert height("Hi") > 0.8 * 224 / 6
    assert height("a b " * 60) <= 224


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no text to draw"),
        (" \n", "no text to draw"),
        ("pasted " * 1_000_000, "at most 2000"),
        ("word " * 399, "does not fit 224x224 px"),
        ("x" * 100, "does not fit 224x224 px"),
        ("日本", "cannot draw '\\u65e5' '\\u672c'"),
        ("a\x00b", "cannot draw '\\x00'"),
    ],
)
def test_text_that_cannot_be_drawn(text: str, words: str) -> None:
    with pytest.raises(ImageError) as caught:
        draw_text(text)
    assert words in str(caught.value)


def test_blank_is_flat_mid_grey() -> None:
    assert blank().getcolors() == [(224 * 224, (127, 127, 127))]
    assert draw({"kind": "blank"}).tobytes() == blank().tobytes()
    assert draw({"kind": "blank", "value": ""}, size=32).tobytes() == blank(32).tobytes()


def test_noise_is_seeded_and_uniform() -> None:
    assert (
        noise(3).tobytes() == noise(3).tobytes() == draw({"kind": "noise", "value": "3"}).tobytes()
    )
    assert noise(3).tobytes() != noise(4).tobytes()
    pixels = np.asarray(noise(0))
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert abs(pixels.mean() - 127.5) < 1
    assert noise(0, 9).getpixel((0, 0)) == noise(0, 9).getpixel((0, 0))


def test_noise_stream_is_frozen() -> None:
    assert list(noise(0, 8).tobytes()[:6]) == FROZEN


FROZEN = [95, 130, 194, 217, 207, 235]


def test_draw_finds_the_right_maker() -> None:
    assert draw({"kind": "object", "value": "key"}).tobytes() == draw_object("key").tobytes()
    assert draw({"kind": "text", "value": "key"}).tobytes() == draw_text("key").tobytes()
    assert isinstance(draw({"kind": "blank"}), Image.Image)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({}, "unknown picture kind None; choose from object, text, blank, noise"),
        ({"kind": "photo", "value": "key"}, "unknown picture kind 'photo'"),
        ({"kind": ["object"]}, "unknown picture kind"),
        ({"kind": "object", "value": "umbrela"}, "did you mean 'umbrella'?"),
        ({"kind": "object", "value": "zzzz"}, "choose from knife, bottle"),
        ({"kind": "object"}, "no drawing of ''"),
        ({"kind": "object", "value": 3}, "must be a string"),
        ({"kind": "text"}, "no text to draw"),
        ({"kind": "noise"}, "is not a seed"),
        ({"kind": "noise", "value": "-1"}, "is not a seed"),
        ({"kind": "noise", "value": "²"}, "is not a seed"),
        ({"kind": "noise", "value": "9" * 5000}, "is not a seed"),
        ({"kind": "blank", "value": "grey"}, "takes no value"),
    ],
)
def test_unknown_pictures_are_refused(spec: dict, words: str) -> None:
    with pytest.raises(ImageError) as caught:
        draw(spec)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("size", [-1, 0, 7, 5000])
def test_absurd_sizes_are_refused(size: int) -> None:
    for make in (lambda: draw_object("key", size), lambda: blank(size), lambda: noise(0, size)):
        with pytest.raises(ImageError, match="picture size"):
            make()


def test_negative_seed_is_refused() -> None:
    with pytest.raises(ImageError, match="negative"):
        noise(-1)
