"""Answers one request and streams the text."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from PIL import Image
from transformers import TextStreamer

from vlm_safeguard.guard import Guard, reads_pictures
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.loading import LoadedModel


class _Streamer(TextStreamer):
    """Hands finished words to a callback."""

    def __init__(self, tokenizer: Any, put: Callable[[str], None] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._put, self.text = put, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        if self._put:
            self._put(text)


@torch.inference_mode()
def stream(
    loaded: LoadedModel,
    prompt: str,
    image: Image.Image | None,
    guard: Guard | None,
    max_new_tokens: int,
    put: Callable[[str], None] | None,
) -> tuple[str, bool | None]:
    """Greedy answer and whether the gate fired; ``put`` gets the answer's pieces as they come."""
    inputs = encode(loaded, [prompt], [image], reads_pictures(guard))
    streamer = _Streamer(loaded.processor.tokenizer, put)
    with guard.attach(loaded.model, loaded.processor) if guard else nullcontext() as session:
        loaded.model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer
        )
        fired = session.decisions[0].fired if session else None
    return streamer.text.strip(), fired
