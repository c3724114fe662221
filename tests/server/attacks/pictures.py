"""Hostile pictures, made byte by byte."""

from __future__ import annotations

import base64
import struct
import zlib
from io import BytesIO

from PIL import Image


def png(width: int = 24, height: int = 24) -> bytes:
    return encoded("PNG", width, height)


def encoded(kind: str, width: int = 24, height: int = 24, **options: object) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (width, height), "gray").save(buffer, kind, **options)
    return buffer.getvalue()


def animated(kind: str) -> bytes:
    """Two frames."""
    return encoded(
        kind, save_all=True, append_images=[Image.new("RGB", (24, 24), "red")], duration=100
    )


def _chunk(name: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)


def bomb(width: int, height: int) -> bytes:
    """A PNG of one small chunk that says it has ``width`` x ``height`` pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100_000), 9)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", pixels)
        + _chunk(b"IEND", b"")
    )


def text_bomb() -> bytes:
    """A sound PNG whose comment unpacks to 100 MB."""
    packed = zlib.compress(bytes(100_000_000), 9)
    data = png()
    return data[:33] + _chunk(b"zTXt", b"Comment\x00\x00" + packed) + data[33:]


def wide_webp() -> bytes:
    """A WebP header of 16383 x 16383 pixels without the pixels."""
    size = (16383 | 16383 << 16).to_bytes(4, "little")
    frame = b"\x30\x01\x00\x9d\x01\x2a" + size + bytes(40)
    body = b"WEBPVP8 " + struct.pack("<I", len(frame)) + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


SVG = b"""<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]>
<svg xmlns="http://www.w3.org/2000/svg" width="24" height="24"><text>&x;</text></svg>"""
FITS = b"SIMPLE  =                    T".ljust(80) + b"BITPIX  =   8".ljust(80) + b"END".ljust(2720)


def refused() -> dict[str, bytes]:
    """Files that are no picture for us, by what is wrong with them."""
    sound = png()
    return {
        "empty": b"",
        "noise": bytes(range(256)) * 8,
        "bomb": bomb(60_000, 60_000),
        "bomb of 26 megapixels": bomb(5200, 5000),
        "bomb of 2^31": bomb(2**31 - 1, 2**31 - 1),
        "no width": bomb(0, 24),
        "header only": sound[:33],
        "one pixel": png(1, 1),
        "a line": png(5000, 1),
        "too long": png(2400, 8),
        "cut short": encoded("JPEG", 200, 200)[:400],
        "PNG cut short": bomb(300, 300)[:60],
        "animated GIF": animated("GIF"),
        "animated PNG": animated("PNG"),
        "animated WebP": animated("WEBP"),
        "still GIF": encoded("GIF"),
        "TIFF": encoded("TIFF"),
        "BMP": encoded("BMP"),
        "ICO": encoded("ICO"),
        "PPM": encoded("PPM"),
        "PDF": encoded("PDF"),
        "SVG": SVG,
        "FITS": FITS,
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 24\n(a) run\n",
        "wide WebP": wide_webp(),
        "polyglot that begins as a script": b"#!/bin/sh\nid\n" + sound,
        "polyglot that begins as a zip": b"PK\x03\x04" + sound,
        "PNG in name only": sound[:8] + SVG,
        "damaged": sound[:40] + b"\xff" * 8 + sound[48:],
    }


def accepted() -> dict[str, bytes]:
    """Pictures that are odd and sound."""
    sound = png()
    return {
        "PNG and a zip": sound + b"PK\x03\x04" + bytes(64),
        "JPEG and a script": encoded("JPEG") + b"<script>alert(1)</script>",
        "WebP": encoded("WEBP"),
        "least": png(8, 8),
        "as long as is allowed": png(800, 8),
        "CMYK": _cmyk(),
        "16 bits": _deep(),
    }


def _cmyk() -> bytes:
    buffer = BytesIO()
    Image.new("CMYK", (24, 24)).save(buffer, "JPEG")
    return buffer.getvalue()


def _deep() -> bytes:
    buffer = BytesIO()
    Image.new("I;16", (24, 24), 40_000).save(buffer, "PNG")
    return buffer.getvalue()


def uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def part(url: str) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": url}}
