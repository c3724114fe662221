"""Encodes requests with a model's chat template and processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from PIL import Image
from torch import Tensor

from vlm_safeguard.data.ocr import reader, with_words
from vlm_safeguard.errors import ModelError
from vlm_safeguard.model.loading import LoadedModel


def conversation(prompt: str, images: int = 0) -> list[dict[str, Any]]:
    """One user turn in the chat format that processors' templates take, pictures first."""
    parts: list[dict[str, Any]] = [{"type": "image"} for _ in range(images)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]


def render(processor: Any, prompt: str, pictures: int = 0) -> str:
    """A single-turn request through the chat template, pictures first, ready for an answer.

    Without a picture it is the request with its pictures taken out, which the template's own
    rendering of text alone is, unless the template says more where there is no picture (a system
    message, say).
    """

    def rendered(count: int) -> str:
        return str(
            processor.apply_chat_template(
                conversation(prompt, count), add_generation_prompt=True, tokenize=False
            )
        )

    if pictures:
        return rendered(pictures)
    plain = rendered(0)
    try:
        one, two = rendered(1), rendered(2)
    except TemplateError:  # one picture at most
        return plain
    size, end = len(two) - len(one), 0
    while end < len(one) and one[end] == two[end]:
        end += 1
    if (
        size <= 0
        or one[end:] != two[end + size :]
        or two[end : end + size] != one[end - size : end]
    ):
        return plain  # the template does not write one picture after the other
    cut = one[: end - size] + one[end:]
    return plain if "".join(plain.split()) == "".join(cut.split()) else cut


def process(
    loaded: LoadedModel, texts: Sequence[str], pictures: Sequence[Sequence[Image.Image]]
) -> dict[str, Any]:
    """Rendered requests, each with its pictures in order, through the processor; left-padded.

    The tokenizer adds its special tokens unless the template begins with the first of them, as in
    transformers' own ``apply_chat_template(tokenize=True)`` and pipelines: LLaVA-1.5's template
    leaves that token to the tokenizer.

    Raises:
        ModelError: the processor takes no such batch.
    """
    first = loaded.processor.tokenizer.bos_token
    options: dict[str, Any] = {
        "padding": True,
        "return_tensors": "pt",
        "add_special_tokens": not (first and texts[0].startswith(first)),
    }
    if any(pictures):
        # Row by row: some processors take a flat list for one row's.
        options["images"] = [list(row) for row in pictures]
    try:
        return dict(loaded.processor(text=list(texts), **options))
    except (ValueError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{loaded.name}: its processor refuses a batch of {len(texts)} with "
            f"{sum(map(len, pictures))} pictures: {reason}"
        ) from error


def encode(
    loaded: LoadedModel,
    prompts: Sequence[str],
    pictures: Sequence[Image.Image | None],
    read_pictures: bool = False,
) -> dict[str, Tensor]:
    """Model inputs for a batch of single-turn requests, each with one picture or none.

    Left-padded, on the model's device. Prompts pass through the chat template. Control tokens
    typed by a user are neutralised so that a prompt cannot open a turn of its own.

    Args:
        read_pictures: for guards with ``reads_pictures``: also ``text_input_ids`` and
            ``text_attention_mask``, the requests as text with the words that stand in their
            pictures. Only a guarded model takes them.

    Raises:
        ModelError: the processor takes no such batch.
        SafeguardError: pictures are to be read and the OCR library is missing.
    """
    processor = loaded.processor
    prompts = [neutralise(processor.tokenizer, prompt) for prompt in prompts]
    texts = [
        render(processor, prompt, 0 if picture is None else 1)
        for prompt, picture in zip(prompts, pictures, strict=True)
    ]
    batch = process(loaded, texts, [[] if p is None else [p] for p in pictures])
    if read_pictures:
        words = ["" if p is None else reader().words(p) for p in pictures]
        spoken = [
            render(processor, with_words(prompt, neutralise(processor.tokenizer, said)))
            for prompt, said in zip(prompts, words, strict=True)
        ]
        alone = process(loaded, spoken, [[]] * len(spoken))
        batch["text_input_ids"] = alone["input_ids"]
        batch["text_attention_mask"] = alone["attention_mask"]
    return {
        key: value.to(loaded.device)
        for key, value in batch.items()
        if isinstance(value, Tensor) and key != "labels"  # those are for training
    }


def neutralise(tokenizer: Any, prompt: str) -> str:
    """Break every special token that stands in user text with a zero-width space."""
    for token in sorted(tokenizer.get_added_vocab(), key=len, reverse=True):
        if len(token) > 1 and token in prompt:
            prompt = prompt.replace(token, token[0] + "\u200b" + token[1:])
    return prompt
