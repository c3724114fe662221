"""The door for untrusted pictures, on real files: what opens, what is refused, and how."""

from __future__ import annotations

import os
import re
import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_safeguard.data import image_io
from vlm_safeguard.data.image_io import LIMITS, Limits, as_picture, decode_image, open_image
from vlm_safeguard.errors import ImageError

# How an object of Python shows itself; a size such as 40x30 px is no address.
PILLOW_TEXT = r"<_io|object at| at 0x"


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width: int = 40, height: int = 30) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 8 % 256, columns * 6 % 256, (rows + columns) % 256], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def bare_png(width: int, height: int, body: bytes = b"") -> bytes:
    """A PNG whose header claims any size, with next to no pixels behind it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packed = zlib.compress(body or b"\0" * 64)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    )


def bare_webp(chunk: bytes, head: bytes) -> bytes:
    body = b"WEBP" + chunk + struct.pack("<I", len(head)) + head
    return b"RIFF" + struct.pack("<I", len(body)) + body


def refusal(source: str | Path | bytes) -> str:
    with pytest.raises(ImageError) as caught:
        open_image(source)
    text = str(caught.value)
    assert not re.search(PILLOW_TEXT, text)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return text


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("PNG", {"interlace": 1}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"quality": 95}),
        ("WEBP", {"lossless": True, "exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"}),
        ("JPEG", {"quality": 95, "subsampling": 0}),
        ("JPEG", {"quality": 95, "progressive": True, "subsampling": 0}),
    ],
)
@pytest.mark.parametrize("given_as", [str, Path, bytes])
def test_formats_open_as_rgb(tmp_path: Path, kind: str, options: dict, given_as: type) -> None:
    path = tmp_path / "picture.anything"
    path.write_bytes(encoded(gradient(), kind, **options))
    image = open_image(path.read_bytes() if given_as is bytes else given_as(path))
    assert type(image) is Image.Image
    assert (image.mode, image.size, image.info) == ("RGB", (40, 30), {})
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(gradient()))
    assert difference.mean() < 12


def test_alpha_is_laid_on_white() -> None:
    image = Image.new("RGBA", (10, 10), (255, 0, 0, 128))
    image.putpixel((0, 0), (0, 0, 0, 0))
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        opened = open_image(encoded(image, kind, **options))
        assert opened.getpixel((0, 0)) == (255, 255, 255)
        assert opened.getpixel((5, 5)) == (255, 127, 127)
    grey = open_image(encoded(Image.new("LA", (10, 10), (0, 0))))
    assert grey.getpixel((5, 5)) == (255, 255, 255)


def test_palette_with_and_without_transparency() -> None:
    image = Image.new("P", (10, 10), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.putpixel((0, 0), 0)
    assert open_image(encoded(image)).getpixel((5, 5)) == (10, 200, 30)
    clear = open_image(encoded(image, transparency=0))
    assert clear.getpixel((0, 0)) == (255, 255, 255)
    assert clear.getpixel((5, 5)) == (10, 200, 30)
    partly = open_image(encoded(image, transparency=b"\x00\x80"))
    assert partly.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(("mode", "value"), [("RGB", (1, 2, 3)), ("L", 7), ("1", 0)])
def test_transparent_colour_key(mode: str, value: object) -> None:
    image = Image.new(mode, (10, 10), value)
    assert open_image(encoded(image, transparency=value)).getpixel((5, 5)) == (255, 255, 255)


def test_grey_modes() -> None:
    assert open_image(encoded(Image.new("L", (9, 9), 90))).getpixel((0, 0)) == (90, 90, 90)
    assert open_image(encoded(Image.new("1", (9, 9), 1))).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(encoded(Image.new("L", (9, 9), 90), "JPEG")).mode == "RGB"


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    levels = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    opened = np.asarray(open_image(encoded(Image.fromarray(levels))))
    assert (opened[..., 0] == (levels >> 8)).all()
    assert (opened[..., 0] == opened[..., 2]).all()
    keyed = open_image(encoded(Image.fromarray(levels), transparency=40000))
    assert keyed.mode == "RGB"


def test_cmyk_jpeg_becomes_rgb() -> None:
    image = Image.new("CMYK", (20, 20), (0, 255, 255, 0))
    red, green, blue = open_image(encoded(image, "JPEG", quality=95)).getpixel((9, 9))
    assert red > 230 and green < 30 and blue < 30


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.new("RGB", (48, 24), "black")
    image.paste("white", (0, 0, 24, 12))
    opened = open_image(encoded(image, kind, exif=exif.tobytes()))
    assert opened.size == ((48, 24) if orientation < 5 else (24, 48))
    bright = {
        1: (0, 0),
        2: (1, 0),
        3: (1, 1),
        4: (0, 1),
        5: (0, 0),
        6: (1, 0),
        7: (1, 1),
        8: (0, 1),
    }
    right, low = bright[orientation]
    corner = (right * (opened.width - 5) + 2, low * (opened.height - 5) + 2)
    assert min(opened.getpixel(corner)) > 200
    assert opened.getexif().get(0x0112) is None


@pytest.mark.parametrize("exif", [b"Exif\0\0junk", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_broken_exif_does_not_lose_the_photo(exif: bytes) -> None:
    assert open_image(encoded(gradient(), "JPEG", exif=exif)).size == (40, 30)


def test_first_picture_of_a_phone_jpeg() -> None:
    data = encoded(
        gradient(), "MPO", save_all=True, append_images=[Image.new("RGB", (16, 16), "red")]
    )
    assert open_image(data).size == (40, 30)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_animations_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "film"
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(path, kind, save_all=True, append_images=frames[1:])
    assert refusal(path) == f"{path}: animated; save one frame as a still picture"


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO", "JPEG2000"])
def test_other_formats_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(gradient(32, 32), kind))
    text = f"{path}: not a PNG, JPEG or WebP picture; save it as a still PNG, JPEG or WebP picture"
    assert refusal(path) == text


def test_text_file_and_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "notes.png"
    path.write_text("not a picture at all")
    assert refusal(path).startswith(f"{path}: not a PNG, JPEG or WebP picture")
    path.write_bytes(b"")
    assert refusal(path) == f"{path}: empty; give a PNG, JPEG or WebP picture"
    assert refusal(b"").startswith("the picture: empty")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_cut_short(tmp_path: Path, kind: str) -> None:
    data = encoded(Image.effect_noise((64, 64), 80).convert("RGB"), kind)
    path = tmp_path / "half"
    for length in (12, 20, 40, len(data) // 2, len(data) * 9 // 10):
        path.write_bytes(data[:length])
        assert refusal(path) == (
            f"{path}: damaged or cut short; export or download the picture again"
        )


def test_corrupt_pixels(tmp_path: Path) -> None:
    data = bytearray(encoded(gradient()))
    start = data.index(b"IDAT") + 10
    data[start : start + 20] = b"\xff" * 20
    path = tmp_path / "bad.png"
    path.write_bytes(data)
    assert "damaged or cut short" in refusal(path)


def test_paths_that_are_no_picture_file(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path}: a directory; name one picture file in it"
    missing = tmp_path / "missing.png"
    assert refusal(missing).startswith(f"{missing}: no such file; check the path")
    assert "only local files" in refusal("https://example.org/cat.png")
    assert refusal("").startswith("'': ")
    assert "cannot be read as a file" in refusal("nul\0byte.png")
    assert r"\x1b" in refusal("\x1b[31mred.png")
    assert len(refusal("data:image/png;base64," + "A" * 100_000)) < 300
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert "not a regular file" in refusal(pipe)
    assert "not a regular file" in refusal("/dev/zero")


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(encoded(gradient()))

    def deny(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", deny)  # chmod does not stop root, who runs many CIs
    text = refusal(path)
    assert text == f"{path}: no permission to read it; change its permissions"


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((1, 1), "1x1 px: at least 8 px a side"),
        ((7, 300), "7x300 px: at least 8 px a side"),
        ((300, 7), "300x7 px: at least 8 px a side"),
        ((5000, 1), "5000x1 px: at least 8 px a side"),
        ((8, 801), "8x801 px: one side is over 100 times the other"),
        ((5001, 5000), "5001x5000 px: more than 25 megapixels"),
        ((12000, 9000), "more than 25 megapixels"),
        ((60000, 60000), "more than 25 megapixels"),
        ((2**31 - 1, 2**31 - 1), "more than 25 megapixels"),
    ],
)
def test_sizes_are_refused_from_the_header(
    size: tuple[int, int], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert words in refusal(bare_png(*size))
    assert not seen


@pytest.mark.parametrize("chunk", [b"VP8X", b"VP8 ", b"VP8L"])
def test_webp_canvas_is_refused_before_its_reader_starts(
    chunk: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = 16383
    head = {
        b"VP8X": b"\0" * 4 + (side - 1).to_bytes(3, "little") * 2,
        b"VP8 ": b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", side, side),
        b"VP8L": b"\x2f" + struct.pack("<I", (side - 1) | (side - 1) << 14),
    }[chunk]

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(image_io.Image, "open", opened)
    assert "16383x16383 px: more than 25 megapixels" in refusal(bare_webp(chunk, head + b"\0" * 8))


def test_sizes_at_the_limits_open() -> None:
    assert open_image(encoded(Image.new("RGB", (8, 8)))).size == (8, 8)
    assert open_image(encoded(Image.new("RGB", (8, 800)))).size == (8, 800)
    assert open_image(encoded(Image.new("L", (5000, 5000)))).size == (5000, 5000)


def test_file_size(tmp_path: Path) -> None:
    data = encoded(gradient())
    path = tmp_path / "large.png"
    path.write_bytes(data.ljust(LIMITS.max_bytes, b"\0"))
    assert open_image(path).size == (40, 30)
    path.write_bytes(data.ljust(LIMITS.max_bytes + 1, b"\0"))
    assert refusal(path).startswith(f"{path}: more than 20 MB")
    assert refusal(b"\0" * (LIMITS.max_bytes + 1)).startswith("the picture: more than 20 MB")


def test_a_server_sets_limits_of_its_own() -> None:
    data = encoded(gradient(40, 20))
    assert decode_image(data, Limits(len(data), 800, 20, 2)).size == (40, 20)
    for limits, words in (
        (Limits(max_bytes=len(data) - 1), "MB; save it smaller"),
        (Limits(max_pixels=799), "40x20 px: more than 0.000799 megapixels"),
        (Limits(min_side=21), "40x20 px: at least 21 px a side"),
        (Limits(max_aspect=1), "40x20 px: one side is over 1 times the other"),
    ):
        with pytest.raises(ImageError, match=words):
            decode_image(data, limits)


@pytest.mark.parametrize("given", ["/etc/passwd", Path("/etc/passwd"), None, bytearray(b"x")])
def test_bytes_that_somebody_sent_name_no_file(given: object) -> None:
    with pytest.raises(ImageError, match=f"{type(given).__name__} instead of bytes"):
        decode_image(given)  # type: ignore[arg-type]


def test_animated_gif_and_svg_are_other_formats() -> None:
    frames = [Image.new("P", (20, 20), n) for n in range(2)]
    film = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="20" height="20"><image href="/"/></svg>'
    for data in (film, svg, b"<?xml version='1.0'?>" + svg):
        assert refusal(data).startswith("the picture: not a PNG, JPEG or WebP picture")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_what_lies_behind_a_picture_is_not_read(kind: str) -> None:
    """A polyglot: another format, or a page, in the same file."""
    data = encoded(gradient(), kind)
    for rest in (b"PK\x03\x04zip", b"<script>", encoded(Image.new("RGB", (90, 90)), "PNG")):
        assert (np.asarray(open_image(data + rest)) == np.asarray(open_image(data))).all()
    assert refusal(b"GIF89a" + data).startswith("the picture: not a PNG")


def test_a_picture_in_a_request_is_a_decoded_rgb_one(tmp_path: Path) -> None:
    rgb = gradient()
    assert as_picture(rgb) is rgb
    clear = Image.new("RGBA", (10, 10), (255, 0, 0, 0))
    assert as_picture(clear).getpixel((5, 5)) == (255, 255, 255)
    grey = Image.fromarray(np.full((9, 9), 40_000, np.uint16))
    assert as_picture(grey).getpixel((5, 5)) == (156, 156, 156)
    assert grey.mode == "I;16"
    (tmp_path / "half.png").write_bytes(encoded(Image.effect_noise((64, 64), 80))[:400])
    damaged = pytest.raises(ImageError, match="the picture: damaged or cut short")
    with Image.open(tmp_path / "half.png") as half, damaged:
        as_picture(half)
    for size, words in (((1, 1), "at least 8 px"), ((5000, 9), "over 100 times the other")):
        with pytest.raises(ImageError, match=words):
            as_picture(Image.new("RGB", size))
    with pytest.raises(ImageError, match="pixels are floats"):
        as_picture(Image.fromarray(np.ones((9, 9), np.float32)))


def test_warning_filters_of_the_caller_are_kept() -> None:
    before = list(warnings.filters)
    open_image(encoded(gradient()))
    refusal(b"\x89PNG\r\n\x1a\n")
    assert warnings.filters == before


FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
SEEDS = [
    encoded(gradient(16, 12)),
    encoded(gradient(16, 12).convert("RGBA")),
    encoded(gradient(16, 12).convert("P"), transparency=3),
    encoded(gradient(16, 12), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01"),
    encoded(gradient(16, 12).convert("CMYK"), "JPEG"),
    encoded(gradient(16, 12), "WEBP"),
    encoded(gradient(16, 12), "WEBP", lossless=True),
]
SIGNATURES = [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\x40\0\0\0WEBPVP8X"]


def opens_or_refuses(data: bytes) -> None:
    try:
        image = open_image(data)
    except ImageError as error:
        assert str(error).startswith("the picture: ")
        assert not re.search(PILLOW_TEXT, str(error))
    else:
        image.load()
        assert image.mode == "RGB"


@FUZZ
@given(signature=st.sampled_from(SIGNATURES), rest=st.binary(max_size=400))
def test_fuzz_random_bytes(signature: bytes, rest: bytes) -> None:
    opens_or_refuses(signature + rest)


@FUZZ
@given(data=st.data(), seed=st.sampled_from(SEEDS))
def test_fuzz_mutated_pictures(data: st.DataObject, seed: bytes) -> None:
    mutated = bytearray(seed)
    edits = st.tuples(st.integers(0, len(seed) - 1), st.binary(min_size=1, max_size=4))
    for place, change in data.draw(st.lists(edits, max_size=6)):
        mutated[place : place + len(change)] = change
    cut = data.draw(st.one_of(st.none(), st.integers(1, len(mutated))))
    opens_or_refuses(bytes(mutated[:cut]))


@FUZZ
@given(place=st.integers(0, 60), change=st.binary(min_size=1, max_size=8), fix=st.booleans())
def test_fuzz_png_chunks_with_valid_checksums(place: int, change: bytes, fix: bool) -> None:
    """Checksums stop most mutations at the first chunk; repaired ones reach the decoder."""
    mutated = bytearray(encoded(gradient(16, 12)))
    mutated[8 + place : 8 + place + len(change)] = change
    at = 8
    while fix and at + 12 <= len(mutated):
        (length,) = struct.unpack_from(">I", mutated, at)
        if at + 12 + length > len(mutated):
            break
        crc = zlib.crc32(mutated[at + 4 : at + 8 + length])
        struct.pack_into(">I", mutated, at + 8 + length, crc)
        at += 12 + length
    opens_or_refuses(bytes(mutated))
