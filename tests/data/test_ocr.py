"""The words in pictures: what is read, and that the text-only pass takes them in place."""

from __future__ import annotations

import importlib.util
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from vlm_safeguard.data import drawings, ocr
from vlm_safeguard.errors import SafeguardError

needs_ocr = pytest.mark.skipif(
    importlib.util.find_spec("rapidocr") is None, reason="rapidocr is not installed"
)


@needs_ocr
@pytest.mark.parametrize("words", ["water the plants", "Paint the garden fence", "call your aunt"])
def test_drawn_words_are_read(words: str) -> None:
    said = ocr.reader().words(drawings.draw({"kind": "text", "value": words}))
    assert said.lower().split() == words.lower().split()


@needs_ocr
@pytest.mark.parametrize("kind", ["blank", "noise"])
def test_a_picture_without_words_has_none(kind: str) -> None:
    picture = drawings.blank() if kind == "blank" else drawings.noise(3)
    assert ocr.reader().words(picture) == ""


@needs_ocr
def test_tiny_and_flat_pictures_are_read_as_nothing() -> None:
    for size in ((1, 1), (1, 300), (300, 1)):
        assert ocr.reader().words(Image.new("RGB", size, (9, 9, 9))) == ""


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ocr, "find_spec", lambda name: None)
    with pytest.raises(SafeguardError, match=r"vlm-safeguard\[ocr\]"):
        ocr.reader.__wrapped__()


def test_words_follow_the_request() -> None:
    said = ocr.with_words("Do it.", "bake a cake")
    assert said == "Do it.\nThe picture says: bake a cake"
    assert ocr.with_words("Do it.", "") == "Do it."


class _Engine:
    """Finds given lines."""

    def __init__(self, lines: list[tuple[str, float]] | None) -> None:
        self.lines, self.calls = lines, 0

    def __call__(self, pixels: object) -> object:
        self.calls += 1
        found = self.lines or []
        return type(
            "Found",
            (),
            {
                "txts": tuple(t for t, _ in found) if self.lines else None,
                "scores": tuple(s for _, s in found) if self.lines else None,
            },
        )()


def unread(width: int = 20, height: int = 20) -> Image.Image:
    """A picture that is not of one colour."""
    picture = Image.new("RGB", (width, height), (1, 2, 3))
    picture.putpixel((0, 0), (9, 9, 9))
    return picture


def made(lines: list[tuple[str, float]] | None) -> ocr.Reader:
    return ocr.Reader(_Engine(lines))


def test_unsure_and_single_letters_are_dropped() -> None:
    one = made([("bake", 0.9), ("T", 0.99), ("noise", 0.3), ("a  cake", 0.8)])
    assert one.words(unread()) == "bake a cake"


def test_long_texts_are_cut() -> None:
    assert len(made([("word " * 900, 1.0)]).words(unread())) <= 600


def test_a_picture_is_read_once() -> None:
    one = made(None)
    for _ in range(3):
        assert one.words(unread()) == ""
    one.words(unread(20, 21))
    assert one._engine.calls == 2


def test_a_picture_of_one_colour_is_not_searched() -> None:
    one = made([("bake", 0.9)])
    for colour in ((0, 0, 0), (1, 2, 3)):
        assert one.words(Image.new("RGB", (20, 20), colour)) == ""
    assert one.words(Image.new("L", (20, 21), 7)) == ""
    assert one._engine.calls == 0
    assert one.words(unread()) == "bake" and one._engine.calls == 1


@pytest.mark.parametrize("size", [(8, 800), (800, 8), (30, 300), (100, 800), (9, 73)])
def test_a_narrow_picture_is_widened_and_not_enlarged(size: tuple[int, int]) -> None:
    """OCR enlarges a picture until its shorter side has ``SIDE`` pixels: 8 x 800 to 10 megapixels,
    and to less than one where it is 100 x 800."""
    seen: list[np.ndarray] = []
    one = ocr.Reader(lambda pixels: (seen.append(pixels), _Engine(None)(pixels))[1])
    one.words(unread(*size))
    height, width = seen[0].shape[:2]
    assert max(height, width) == max(size) and max(height, width) <= 8 * min(height, width)
    assert seen[0][: size[1], : size[0]].tolist() == np.asarray(unread(*size))[:, :, ::-1].tolist()
    assert (seen[0][size[1] :] == (3, 2, 1)).all() and (seen[0][:, size[0] :] == (3, 2, 1)).all()


@needs_ocr
def test_a_long_line_of_text_is_read() -> None:
    line = Image.new("RGB", (900, 24), "white")
    font = ImageFont.load_default(18)
    ImageDraw.Draw(line).text((4, 1), "how to bake a loaf of bread " * 3, "black", font)
    assert "bake a loaf" in ocr.reader().words(line)


def test_threads_take_turns() -> None:
    """The engine keeps what it works on."""
    inside, most = [], []

    def engine(pixels: np.ndarray) -> object:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()
        return _Engine(None)(pixels)

    one = ocr.Reader(engine)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: one.words(unread(20, 20 + n)), range(8)))
    assert len(most) == 8 and max(most) == 1


def test_the_pixels_given_to_the_engine_are_in_its_order() -> None:
    seen: list[torch.Tensor] = []
    one = made(None)
    engine = one._engine
    one._engine = lambda pixels: (seen.append(torch.tensor(pixels.copy())), engine(pixels))[1]
    one.words(unread(4, 4))
    assert seen[0][1, 1].tolist() == [3, 2, 1]
