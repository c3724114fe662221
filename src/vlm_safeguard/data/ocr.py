"""Reads the text in a picture by OCR (rapidocr, an extra of this package).

A typographic attack (FigStep, arXiv 2311.05608) writes the harmful request into the picture and
asks for it in harmless words. A guard that reads pictures adds their words to the text-only
reading, so that the language model's own sense of harm sees them.
"""

from __future__ import annotations

import hashlib
import re
import threading
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
from PIL import Image

from vlm_safeguard.errors import SafeguardError

SIDE = 320  # pixels of the shorter side that lines of text are looked for at
LONGEST = 8  # times the shorter side; a narrow picture would be enlarged to millions of pixels
CERTAIN = 0.6  # confidence from which a line counts
MAX_CHARACTERS = 600  # of one picture: a scanned page is not a request
_KEPT = 4096  # pictures whose words are remembered
_WORD = re.compile(r"[^\W_]{2}")


class Reader:
    """Reads pictures, one at a time.

    Args:
        engine: finds the words in pixels (H, W, 3), BGR, as ``RapidOCR`` does, see ``reader``.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._known: dict[str, str] = {}
        self._lock = threading.Lock()  # the engine keeps what it works on

    def words(self, picture: Image.Image) -> str:
        """The words in an RGB picture, in reading order; empty if there are none."""
        pixels = np.asarray(picture.convert("RGB"))
        key = hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).hexdigest()
        with self._lock:
            if key not in self._known:
                if len(self._known) >= _KEPT:
                    self._known.clear()
                self._known[key] = self._read(pixels)
            return self._known[key]

    def forget(self) -> None:
        """Read every picture anew from now on, as one that was never seen."""
        self._known.clear()

    def _read(self, pixels: np.ndarray) -> str:
        if (pixels == pixels[:1, :1]).all():
            return ""  # of one colour, as the blank pictures are that open the modality gap
        found = self._engine(_less_narrow(pixels)[:, :, ::-1])  # it takes BGR, as OpenCV does
        lines = [
            text
            for text, score in zip(found.txts or (), found.scores or (), strict=True)
            if score >= CERTAIN and _WORD.search(text)
        ]
        return " ".join(" ".join(lines).split())[:MAX_CHARACTERS]


def _less_narrow(pixels: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3), widened with its middle colour where it is narrower than ``LONGEST``."""
    height, width = pixels.shape[:2]
    missing = [
        max(0, -(-other // LONGEST) - own) for own, other in ((height, width), (width, height))
    ]
    if not any(missing):
        return pixels
    colour = np.median(pixels, (0, 1)).astype(pixels.dtype)
    wider = np.empty((height + missing[0], width + missing[1], 3), pixels.dtype)
    wider[:] = colour
    wider[:height, :width] = pixels
    return wider


def check_installed() -> None:
    """Check, before long work, that words in pictures can be read.

    Raises:
        SafeguardError: rapidocr is not installed.
    """
    if find_spec("rapidocr") is None or find_spec("onnxruntime") is None:
        raise SafeguardError(
            "reading the words in pictures needs rapidocr: pip install 'vlm-safeguard[ocr]'"
        )


@lru_cache
def reader() -> Reader:
    """The reader of this process. Its models come with rapidocr and are loaded once; nothing is
    downloaded.

    Raises:
        SafeguardError: rapidocr is not installed.
    """
    check_installed()
    from rapidocr import RapidOCR

    return Reader(
        RapidOCR(
            params={
                "Global.use_cls": False,  # upside-down lines: an engine of its own, rarely needed
                "Global.log_level": "error",
                "Det.limit_side_len": SIDE,
                "Det.limit_type": "min",
            }
        )
    )


def with_words(prompt: str, words: str) -> str:
    """``prompt`` as text, with the words of its picture.

    They come last, where a model's reading of them is still fresh at the last prompt token: on
    the embedded model harm is told apart far better so than with the words in front.
    """
    return f"{prompt}\nThe picture says: {words}" if words else prompt
