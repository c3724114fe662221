"""Opens untrusted image files and returns plain RGB images.

No other module opens them. Limits are read from the header before any pixel is decoded. Every
refusal is an ``ImageError`` in our own words: Pillow's messages contain heap addresses and do not
say what to do.
"""

from __future__ import annotations

import stat
import threading
import warnings
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps

from vlm_safeguard.errors import ImageError

MAX_BYTES = 20_000_000
MAX_PIXELS = 25_000_000
MAX_ASPECT = 100
MIN_SIDE = 8

_CONVERT = "save it as a still PNG, JPEG or WebP picture"
# One picture is decoded at a time: warning filters belong to the whole process, and the memory
# that a server needs stays that of one picture however many requests arrive together.
_DECODING = threading.Lock()


def open_image(source: str | Path | bytes) -> Image.Image:
    """Open a PNG, JPEG or WebP picture as RGB: upright, on white where it was transparent.

    Args:
        source: path of a local file, or the bytes of one. Nothing is ever downloaded.

    Returns:
        A decoded RGB picture without metadata.

    Raises:
        ImageError: the file cannot be read, is not a still PNG, JPEG or WebP picture, is damaged,
            or is larger, smaller or longer than the limits of this module.
    """
    if isinstance(source, bytes):
        name, data = "the picture", source
    else:
        name, data = _printable(str(source)), _read(source)
    if not data:
        raise ImageError(f"{name}: empty; give a PNG, JPEG or WebP picture")
    if len(data) > MAX_BYTES:
        raise ImageError(
            f"{name}: more than {MAX_BYTES // 10**6} MB; save it smaller or with more compression"
        )
    kind = _kind(data)
    if kind is None:
        raise ImageError(f"{name}: not a PNG, JPEG or WebP picture; {_CONVERT}")
    damaged = ImageError(f"{name}: damaged or cut short; export or download the picture again")
    with _DECODING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return _decode(name, data, kind)
        except ImageError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise ImageError(_too_many_pixels(name)) from None
        except Exception:
            # Pillow raises nearly anything on hostile bytes (SyntaxError, struct.error, EOFError,
            # MemoryError), so a list of types here would leave holes.
            raise damaged from None


def _printable(path: str) -> str:
    """A path fit for a message: no control characters, no pasted megabytes."""
    text = path if path and path.isprintable() else ascii(path)
    return text if len(text) <= 200 else f"{text[:100]}...{text[-60:]}"


def _read(source: str | Path) -> bytes:
    """At most one byte more than the limit, from a regular file only: a pipe would block."""
    name = _printable(str(source))
    try:
        mode = Path(source).stat().st_mode
        if stat.S_ISDIR(mode):
            raise ImageError(f"{name}: a directory; name one picture file in it")
        if not stat.S_ISREG(mode):
            raise ImageError(f"{name}: not a regular file; copy the picture into one")
        with Path(source).open("rb") as file:
            return file.read(MAX_BYTES + 1)
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


def _too_many_pixels(name: str, size: str = "") -> str:
    return f"{name}: {size}more than {MAX_PIXELS // 10**6} megapixels; scale it down"


def _check_size(name: str, size: tuple[int, int]) -> None:
    width, height = size
    shown = f"{width}x{height} px: "
    if min(size) < MIN_SIDE:
        raise ImageError(f"{name}: {shown}at least {MIN_SIDE} px a side; use a larger picture")
    if width * height > MAX_PIXELS:
        raise ImageError(_too_many_pixels(name, shown))
    if max(size) > MAX_ASPECT * min(size):
        raise ImageError(
            f"{name}: {shown}one side is over {MAX_ASPECT} times the other; crop the picture"
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


def _decode(name: str, data: bytes, kind: str) -> Image.Image:
    if kind == "WEBP":
        _check_size(name, _webp_size(data))
    with Image.open(BytesIO(data), formats=[kind]) as image:
        _check_size(name, image.size)
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
