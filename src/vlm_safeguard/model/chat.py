"""Encodes requests with a model's chat template and processor."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from vlm_safeguard.data.image_io import as_picture
from vlm_safeguard.data.ocr import reader, with_words
from vlm_safeguard.errors import ImageError, ModelError
from vlm_safeguard.model.chat_template import templated
from vlm_safeguard.model.control_tokens import ControlTokens
from vlm_safeguard.model.loading import LoadedModel

Conversation = Sequence[Mapping[str, Any]]
_Turn = tuple[str, list[str | None], list[Image.Image]]


def render(processor: Any, prompt: str, pictures: int = 0) -> str:
    """Render a single-turn request with the chat template, pictures first.

    Without pictures, the result is the request with a picture, minus the picture. This is the
    template's own rendering of the text, unless the template adds text when there is no picture,
    such as a system message.

    Raises:
        ModelError: the chat template is missing or fails.
    """

    def rendered(count: int) -> str:
        return templated(processor, [("user", [*[None] * count, prompt])])

    if pictures:
        return rendered(pictures)
    plain = rendered(0)
    try:
        one, two = rendered(1), rendered(2)
    except ModelError:  # one picture at most
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
    processor: Any,
    texts: Sequence[str],
    pictures: Sequence[Sequence[Image.Image]],
    padding_side: str | None = None,
) -> dict[str, Any]:
    """Encode rendered requests with the processor.

    The tokenizer adds its special tokens unless the text starts with the first of them, as in
    transformers' ``apply_chat_template(tokenize=True)`` and pipelines. LLaVA-1.5's template, for
    example, does not write that token.

    Args:
        texts: rendered requests.
        pictures: the pictures of each request, in order, see ``as_picture``.
        padding_side: "left" or "right"; by default the tokenizer's own.

    Raises:
        ImageError: a picture is no ``PIL.Image``, or is damaged, too large or too small.
        ModelError: the processor refuses the batch, or does not know the size of its patches.
    """
    options: dict[str, Any] = {
        "padding": True,
        "return_tensors": "pt",
        "add_special_tokens": _needs_special_tokens(processor, texts[0]),
    }
    if padding_side is not None:
        options["padding_side"] = padding_side
    if any(pictures):
        # Row by row: some processors take a flat list for one row's.
        options["images"] = [list(map(as_picture, row)) for row in pictures]
        _check_patches(processor)
    try:
        return dict(processor(text=list(texts), **options))
    except (ValueError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{type(processor).__name__} refuses a batch of {len(texts)} with "
            f"{sum(map(len, pictures))} pictures: {reason}"
        ) from error


def _needs_special_tokens(processor: Any, text: str) -> bool:
    first = processor.tokenizer.bos_token
    return not (first and text.startswith(first))


def _check_patches(processor: Any) -> None:
    """Refuse a processor that would count a picture's tokens without knowing its patches, as those
    saved before transformers 4.50 do not."""
    names = ("patch_size", "vision_feature_select_strategy")
    taken = inspect.signature(type(processor).__init__).parameters
    for name in names:
        if name in taken and getattr(processor, name, None) is None:
            of = "model.config.vision_config" if name == "patch_size" else "model.config"
            raise ModelError(
                f"{type(processor).__name__} has no {name}, so it cannot count the tokens of a "
                f"picture. Set it and save the processor: processor.{name} = {of}.{name}"
            )


def prepare(
    processor: Any,
    conversations: Sequence[Conversation],
    read_pictures: bool = False,
    padding_side: str | None = None,
) -> dict[str, Tensor]:
    """Model inputs for conversations in the chat format of transformers, padded to one length.

    Control tokens in a message's text are broken up, so that the text cannot start a turn or stand
    for a picture. Other text is encoded as it is.

    Args:
        conversations: each is a list of messages ``{"role": ..., "content": ...}``. The content is
            a text, or a list of ``{"type": "text", "text": ...}`` and
            ``{"type": "image", "image": ...}`` with a ``PIL.Image``.
        read_pictures: for guards with ``reads_pictures``: also return ``text_input_ids`` and
            ``text_attention_mask``, the conversations as text with the words in their pictures.
            Only a guarded model accepts them.
        padding_side: "left" or "right"; by default the tokenizer's own.

    Raises:
        ImageError: a picture is no ``PIL.Image``, or is damaged, too large or too small.
        ModelError: a message has another format, its text writes a control token all the same, or
            the processor refuses the batch.
        SafeguardError: pictures are to be read, but the OCR library is missing.
    """
    if not conversations or not all(conversations):
        raise ModelError("a conversation is empty: it needs at least one message")
    parsed = [[_parsed(message) for message in messages] for messages in conversations]
    batch = _encoded(processor, parsed, padding_side)
    if read_pictures:
        spoken = [list(map(_spoken, turns)) for turns in parsed]
        alone = _encoded(processor, spoken, "left")
        batch["text_input_ids"] = alone["input_ids"]
        batch["text_attention_mask"] = alone["attention_mask"]
    return {
        key: value
        for key, value in batch.items()
        if isinstance(value, Tensor) and key != "labels"  # those are for training
    }


def render_conversation(processor: Any, conversation: Conversation) -> str:
    """Render a conversation with the chat template, with placeholders for pictures."""
    turns = [_parsed(message) for message in conversation]
    return _rendered(processor, turns, ControlTokens.of(processor))


def takes_system(processor: Any) -> bool:
    """Whether the chat template writes what a system message says."""
    said = "VLMSafeguard"
    turns: list[_Turn] = [("system", [said], []), ("user", ["x"], [])]
    try:
        return said in _rendered(processor, turns, ControlTokens.of(processor))
    except ModelError:
        return False


def tokenize(processor: Any, conversation: Conversation) -> tuple[list[int], list[Image.Image]]:
    """Token ids and pictures of a conversation, for an engine that puts the pictures in itself.

    Args:
        processor: the model's processor.
        conversation: as in ``prepare``.

    Returns:
        The ids, with the template's own placeholder for each picture; and the pictures in order.

    Raises:
        ImageError, ModelError: as in ``prepare``.
    """
    if not conversation:
        raise ModelError("a conversation is empty: it needs at least one message")
    turns, control = [_parsed(message) for message in conversation], ControlTokens.of(processor)
    text = _rendered(processor, turns, control)
    _check_control(processor, text, turns, control)
    special = _needs_special_tokens(processor, text)
    ids = processor.tokenizer(text, add_special_tokens=special)["input_ids"]
    return list(ids), [picture for turn in turns for picture in turn[2]]


def _parsed(message: Any) -> _Turn:
    """Role, parts in order (text, or None for a picture), and the pictures of a message."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ModelError(f"a message needs a role and a content, got {str(message)[:80]!r}")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        raise ModelError(
            f"the content of a message is a text or a list of parts, got {type(content).__name__}"
        )
    parts: list[str | None] = []
    pictures: list[Image.Image] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append(part["text"])
        elif kind == "image":
            if "image" not in part:
                keys = ", ".join(sorted(map(str, part)))
                raise ImageError(
                    f"an image of a message has {keys}, and needs `image`, a "
                    "PIL.Image; open files with open_image and addresses yourself, so that no "
                    "request can name them"
                )
            parts.append(None)
            pictures.append(as_picture(part["image"]))
        else:
            raise ModelError(
                'a part of a message is {"type": "text", "text": ...} or {"type": "image", '
                f'"image": a PIL.Image}}, got {kind!r}'
            )
    return message["role"], parts, pictures


def _spoken(turn: _Turn) -> _Turn:
    """A turn as text: its own text, then the words in its pictures."""
    role, parts, pictures = turn
    words = " ".join(filter(None, map(reader().words, pictures))) if pictures else ""
    said = with_words("".join(part for part in parts if part is not None), words)
    return role, [said], []


def _encoded(
    processor: Any, conversations: Sequence[Sequence[_Turn]], padding_side: str | None
) -> dict[str, Any]:
    """Encode parsed conversations.

    Raises:
        ModelError: a text writes a control token, or the processor refuses the batch.
    """
    control = ControlTokens.of(processor)
    texts = [_rendered(processor, turns, control) for turns in conversations]
    pictures = [[i for turn in turns for i in turn[2]] for turns in conversations]
    batch = process(processor, texts, pictures, padding_side)
    for text, turns in zip(texts, conversations, strict=True):
        _check_control(processor, text, turns, control)
    return batch


def _check_control(
    processor: Any, text: str, turns: Sequence[_Turn], control: ControlTokens
) -> None:
    """Refuse a rendered text with other control tokens than the template itself writes.

    Breaking them up in each text by itself is not always enough: two texts side by side can write
    one, and so can letters that the tokenizer normalises.
    """
    same = [
        (role, [part if part is None or not part.strip() else "x" for part in parts], pictures)
        for role, parts, pictures in turns
    ]
    found, expected = (
        control.count(processor.tokenizer(words, add_special_tokens=False)["input_ids"])
        for words in (text, _rendered(processor, same, control))
    )
    if found != expected:
        token = next(id for id in {**found, **expected} if found[id] != expected[id])
        name = processor.tokenizer.convert_ids_to_tokens(token)
        raise ModelError(
            f"a message writes the control token {name!r} in pieces or in other letters: take it "
            "out of the text"
        )


def _rendered(processor: Any, turns: Sequence[_Turn], control: ControlTokens) -> str:
    """Render parsed turns with the chat template, control tokens in their texts broken up."""
    messages = []
    for role, parts, _ in turns:
        words = [part if part is None else control.broken(part) for part in parts]
        messages.append((control.broken(role), words))
    if len(messages) == 1 and messages[0][0] == "user":
        words = messages[0][1]
        pictures = words.count(None)
        if words[:pictures] == [None] * pictures and len(words) == pictures + 1:
            return render(processor, str(words[-1]), pictures)
    return templated(processor, messages)


def single_turn(prompt: str, picture: Image.Image | None) -> Conversation:
    """A request with one picture or none, as a conversation for ``prepare``."""
    image = [] if picture is None else [{"type": "image", "image": picture}]
    return [{"role": "user", "content": [*image, {"type": "text", "text": prompt}]}]


def encode(
    loaded: LoadedModel,
    prompts: Sequence[str],
    pictures: Sequence[Image.Image | None],
    read_pictures: bool = False,
) -> dict[str, Tensor]:
    """Encode a batch of single-turn requests, each with one picture or none.

    Args:
        loaded: the model and its processor.
        prompts: the text of each request.
        pictures: the picture of each request, or None.
        read_pictures: see ``prepare``; pass ``guard.config.reads_pictures``.

    Returns:
        Model inputs on the model's device.
    """
    conversations = [
        single_turn(prompt, picture) for prompt, picture in zip(prompts, pictures, strict=True)
    ]
    inputs = prepare(loaded.processor, conversations, read_pictures)
    return {key: value.to(loaded.device) for key, value in inputs.items()}
