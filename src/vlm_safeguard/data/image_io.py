"""Opens untrusted image files and returns plain RGB images.

No other module opens them, and whatever a model is to see goes through ``as_picture``: the
processors of transformers would download addresses and open paths that stand in a request. Limits
are read from the header before any pixel is decoded. Every refusal is an ``ImageError`` in our own
words: Pillow's messages contain heap addresses and do not say what to do.
"""

from __future__ import annotations

import stat
import threading
import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from vlm_safeguard.errors import ImageError


@dataclass(frozen=True)
class Limits:
    """What a picture may be.

    Attributes:
        max_bytes: of the file.
        max_pixels: width times height.
        min_side: of the shorter side, in pixels.
        max_aspect: the longer side over the shorter one.
    """

    max_bytes: int = 20_000_000
    max_pixels: int = 25_000_000
    min_side: int = 8
    max_aspect: int = 100


LIMITS = Limits()

_CONVERT = "save it as a still PNG, JPEG or WebP picture"
# One picture is decoded at a time: warning filters belong to the whole process, and the memory
# that a server needs stays that of one picture however many requests arrive together.
_DECODING = threading.Lock()


def open_image(source: str | Path | bytes, limits: Limits = LIMITS) -> Image.Image:
    """Open a PNG, JPEG or WebP picture as RGB: upright, on white where it was transparent.

    Args:
        source: path of a local file, or the bytes of one. Nothing is ever downloaded.
        limits: what is refused.

    Returns:
        A decoded RGB picture without metadata.

    Raises:
        ImageError: the file cannot be read, is not a still PNG, JPEG or WebP picture, is damaged,
            or does not keep the limits.
    """
    if isinstance(source, str | Path):
        return _opened(_printable(str(source)), _read(source, limits), limits)
    return decode_image(source, limits)


def decode_image(data: bytes, limits: Limits = LIMITS) -> Image.Image:
    """As ``open_image``, but never a file: for bytes that somebody sent.

    Raises:
        ImageError: ``data`` are not bytes, or see ``open_image``.
    """
    if not isinstance(data, bytes):
        raise ImageError(
            f"the picture: {type(data).__name__} instead of bytes; give the bytes of a PNG, JPEG "
            "or WebP picture"
        )
    return _opened("the picture", data, limits)


def as_picture(given: Any, limits: Limits = LIMITS) -> Image.Image:
    """A picture in a request, as RGB.

    Args:
        given: a ``PIL.Image``. One that is not RGB is laid on white where it is transparent, as
            ``open_image`` does it.
        limits: what is refused.

    Raises:
        ImageError: it is something else (a path or an address is not opened, so that no request can
            name one), is damaged, or does not keep the limits.
    """
    name = "the picture"
    if not isinstance(given, Image.Image):
        kind = type(given).__name__
        if hasattr(given, "shape"):  # would be scaled twice if its values are from 0 to 1
            raise ImageError(
                f"{name}: {kind} instead of a PIL.Image; make one of 8-bit values (height, width, "
                "3) with Image.fromarray"
            )
        raise ImageError(
            f"{name}: {kind} instead of a PIL.Image; open files with open_image and addresses "
            "yourself, so that no request can name them"
        )
    if given.mode == "F":
        raise ImageError(f"{name}: pixels are floats; scale them to 0 to 255 and convert to RGB")
    _check_size(name, given.size, limits)
    try:
        given.load()  # no file is open from here on
        return given if given.mode == "RGB" else _to_rgb(given.copy())
    except Exception:
        raise _damaged(name) from None


def _opened(name: str, data: bytes, limits: Limits) -> Image.Image:
    if not data:
        raise ImageError(f"{name}: empty; give a PNG, JPEG or WebP picture")
    if len(data) > limits.max_bytes:
        raise ImageError(
            f"{name}: more than {_millions(limits.max_bytes)} MB; save it smaller or with more "
            "compression"
        )
    kind = _kind(data)
    if kind is None:
        raise ImageError(f"{name}: not a PNG, JPEG or WebP picture; {_CONVERT}")
    with _DECODING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return _decode(name, data, kind, limits)
        except ImageError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise ImageError(_too_many_pixels(name, limits)) from None
        except Exception:
            # Pillow raises nearly anything on hostile bytes (SyntaxError, struct.error, EOFError,
            # MemoryError), so a list of types here would leave holes.
            raise _damaged(name) from None


def _damaged(name: str) -> ImageError:
    return ImageError(f"{name}: damaged or cut short; export or download the picture again")


def _millions(count: int) -> str:
    return f"{count / 10**6:g}"


def _printable(path: str) -> str:
    """A path fit for a message: no control characters, no pasted megabytes."""
    text = path if path and path.isprintable() else ascii(path)
    return text if len(text) <= 200 else f"{text[:100]}...{text[-60:]}"


def _read(source: str | Path, limits: Limits) -> bytes:
    """At most one byte more than the limit, from a regular file only: a pipe would block."""
    name = _printable(str(source))
    try:
        mode = Path(source).stat().st_mode
        if stat.S_ISDIR(mode):
            raise ImageError(f"{name}: a directory; name one picture file in it")
        if not stat.S_ISREG(mode):
            raise ImageError(f"{name}: not a regular file; copy the picture into one")
        with Path(source).open("rb") as file:
            return file.read(limits.max_bytes + 1)
    except PermissionError:
        raise ImageError(f"{name}: no permission to read it; change its permissions") from None
    except FileNotFoundError:
        raise ImageError(
            f"{name}: no such file; check the path (only local files are opened, no addresses)"
        ) from None
    except (OSError, ValueError):  # ValueError: a NUL or a lone surrogate in the path
        raise ImageError(f"{name}: cannot be read as a file; check the path") from None


def _kind(data: bytes) -> str | None:
    """Pillow's name of the format by its signature; file names are not trusted."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    return None


def _too_many_pixels(name: str, limits: Limits, size: str = "") -> str:
    return f"{name}: {size}more than {_millions(limits.max_pixels)} megapixels; scale it down"


def _check_size(name: str, size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    shown = f"{width}x{height} px: "
    if min(size) < limits.min_side:
        raise ImageError(
            f"{name}: {shown}at least {limits.min_side} px a side; use a larger picture"
        )
    if width * height > limits.max_pixels:
        raise ImageError(_too_many_pixels(name, limits, shown))
    if max(size) > limits.max_aspect * min(size):
        raise ImageError(
            f"{name}: {shown}one side is over {limits.max_aspect} times the other; crop the picture"
        )


def _webp_size(data: bytes) -> tuple[int, int]:
    """Canvas size from the first chunk: Pillow's WebP reader allocates the canvas on opening."""
    chunk, head = data[12:16], data[:30]
    if chunk == b"VP8X" and len(head) == 30:
        return (
            int.from_bytes(head[24:27], "little") + 1,
            int.from_bytes(head[27:30], "little") + 1,
        )
    if chunk == b"VP8 " and head[23:26] == b"\x9d\x01\x2a" and len(head) == 30:
        return (
            int.from_bytes(head[26:28], "little") & 0x3FFF,
            int.from_bytes(head[28:30], "little") & 0x3FFF,
        )
    if chunk == b"VP8L" and len(head) >= 25 and head[20] == 0x2F:
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, ((bits >> 14) & 0x3FFF) + 1
    raise ValueError("not a WebP header")


def _decode(name: str, data: bytes, kind: str, limits: Limits) -> Image.Image:
    if kind == "WEBP":
        _check_size(name, _webp_size(data), limits)
    with Image.open(BytesIO(data), formats=[kind]) as image:
        _check_size(name, image.size, limits)
        # A phone's JPEG may hold a second picture (depth, gain map); its first is the photo.
        if kind != "JPEG" and getattr(image, "is_animated", False):
            raise ImageError(f"{name}: animated; save one frame as a still picture")
        image.load()
        rgb = _to_rgb(_upright(image))
    # What the metadata asked for is done; kept, a later reader could do it a second time.
    rgb.info = {}
    return rgb


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        # Broken EXIF is common and every viewer shows such a photo: the pixels are sound.
        return image.copy()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit grey at 255, which turns nearly all of it white.
        image.info.pop("transparency", None)
        image = image.convert("I").point(lambda value: value * (1 / 256) + 0).convert("L")
    if not image.has_transparency_data:
        return image.convert("RGB")
    drawn = image.convert("RGBA")
    white = Image.new("RGB", drawn.size, "white")
    white.paste(drawn, mask=drawn.getchannel("A"))
    return white
