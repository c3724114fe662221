"""Load a vision-language model and its processor, and find its decoder, verified."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import ModelOutput

from vlm_safeguard.data.ocr import reader, with_words
from vlm_safeguard.errors import ModelError
from vlm_safeguard.model.weights import input_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Decoder:
    """The verified language decoder of a VLM. ``path`` is its name inside the model.

    ``skipped`` are the layers that a request without a picture leaves out: layers that attend to
    the picture alone. The residual stream goes past them unchanged.
    """

    module: nn.Module
    layers: nn.ModuleList
    path: str
    hidden_size: int
    skipped: frozenset[int] = frozenset()


@dataclass
class LoadedModel:
    """A model ready for inference with its processor, and where it came from."""

    model: Any
    processor: Any
    name: str

    @property
    def device(self) -> torch.device:
        return input_device(self.model)


def load(
    name: str | Path,
    dtype: str = "float32",
    device: str = "cpu",
    *,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a VLM and its processor from a folder or a hub name (network only if not a folder).

    Args:
        trust_remote_code: run the Python files that come with the checkpoint. Off, a checkpoint
            that needs them is refused and nobody is asked at the terminal.

    Raises:
        ModelError: the folder is missing or not a model's, the model takes no images, custom
            code would have to run, the weights cannot be read, or there is no such device.
    """
    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}: use one of {', '.join(DTYPES)}")
    place = _device(device)
    local = _local_folder(str(name))
    name = Path(name).expanduser() if local else name
    options = {"local_files_only": local, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(str(name), **options)
        if not hasattr(config, "vision_config"):
            raise ModelError(
                f"{name} is a {config.model_type} model and takes no images: VLM-Safeguard "
                "guards vision-language models (for example LLaVA)"
            )
        processor = AutoProcessor.from_pretrained(str(name), **options)
        model = AutoModelForImageTextToText.from_pretrained(
            str(name), dtype=DTYPES[dtype], **options
        )
    except ModelError:
        raise
    except Exception as error:  # transformers, safetensors and json each raise their own kinds
        reason = str(error).strip().splitlines()
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{name} comes with code of its own, which is not run. Read it first, then "
                "load(..., trust_remote_code=True) runs it"
            ) from error
        raise ModelError(
            f"cannot load the model {name}: {reason[0] if reason else type(error).__name__}. "
            "Check that the folder holds a complete Hugging Face checkpoint (config.json, "
            "weights, processor)."
        ) from error
    if getattr(processor, "image_processor", None) is None:
        raise ModelError(f"{name} has no image processor beside its tokenizer")
    if processor.chat_template is None:
        raise ModelError(f"{name} has no chat template: save its processor with one")
    processor.tokenizer.padding_side = "left"
    return LoadedModel(model.to(place).eval(), processor, str(name))


def _device(name: str) -> torch.device:
    """The device called ``name``, tried out, before anything is loaded for it."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:  # each backend raises its own kinds
        reason = str(error).splitlines()
        raise ModelError(
            f"the device {name!r} cannot be used here: {reason[0] if reason else type(error)}"
        ) from error
    return device


def _local_folder(name: str) -> bool:
    """Whether ``name`` is a folder here; refuses what looks like a path but is none."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name} is a folder without config.json, so not a model's folder")
        return True
    if path.exists():
        raise ModelError(f"{name} is a file: name the model's folder")
    if name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") != 1:
        raise ModelError(
            f"there is no model folder {name}. The embedded model is made by "
            "`vlm-safeguard assemble`, which prints its folder"
        )
    return False


def find_decoder(model: Any) -> Decoder:
    """The language decoder and its layers, checked against the configuration.

    ``get_decoder()`` may silently return the model itself or a wrapper of the decoder, and a
    search by module lists alone may find the vision tower. So the decoder is the one module that
    holds both the embedding of the token ids and a list of as many layers as the text
    configuration says, and it must lie where ``get_decoder()`` points. What cannot be verified is
    refused, never guessed.

    Raises:
        ModelError: the model is not of a kind that can be guarded, or no decoder could be verified.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_decoder"):
        raise ModelError(f"{name} is not a transformers model with a decoder")
    try:
        text = config.get_text_config(decoder=True)
    except ValueError as error:  # several text configurations
        raise ModelError(f"cannot verify the decoder of {name}: {error}") from error
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder model: its decoder is not a residual LLM")
    if getattr(type(model), "generate", None) is not GenerationMixin.generate:
        raise ModelError(
            f"{name} has a generate() of its own, which goes round the forward pass that a guard "
            "follows, so it cannot be guarded; if it wraps a model (an adapter's wrapper), attach "
            "the guard to the model inside"
        )
    depth = getattr(text, "num_hidden_layers", None)
    embedding, pointed = model.get_input_embeddings(), model.get_decoder()
    found = [
        (path, module, layers)
        for path, module in model.named_modules()
        for layers in module.children()
        if isinstance(layers, nn.ModuleList) and len(layers) == depth
        if _holds(module, embedding) and _holds(pointed, module)
    ]
    if len(found) != 1:
        raise ModelError(
            f"cannot verify the decoder of {name}: where get_decoder() points, {len(found)} "
            f"modules hold the token embedding and {depth} layers, as the text configuration says"
        )
    path, module, layers = found[0]
    skipped = frozenset(getattr(text, "cross_attention_layers", None) or ())
    return Decoder(module, layers, path, text.hidden_size, skipped)


def _holds(module: nn.Module, part: nn.Module | None) -> bool:
    return any(inner is part for inner in module.modules())


def hidden_of(output: Any) -> Tensor:
    """The residual stream (B, T, d) in a decoder layer's output: a Tensor, or a tuple's first.

    Raises:
        ModelError: there is none.
    """
    if isinstance(output, Tensor):  # first: this runs at every layer of every step
        hidden = output
    else:
        hidden = output[0] if isinstance(output, (tuple, list, ModelOutput)) and output else output
    if not isinstance(hidden, Tensor) or hidden.ndim != 3 or not hidden.is_floating_point():
        found = (
            f"{hidden.dtype} of shape {tuple(hidden.shape)}"
            if isinstance(hidden, Tensor)
            else type(hidden).__name__
        )
        raise ModelError(
            f"a decoder layer puts out {found}, no residual stream (batch, tokens, hidden size) in "
            "floating point that a guard could read and steer"
        )
    return hidden


def replace_hidden(output: Any, hidden: Tensor) -> Tensor | tuple:
    """A layer output of the same kind with another residual stream."""
    return hidden if isinstance(output, Tensor) else (hidden, *output[1:])


class EnoughSeen(Exception):
    """Ends a pass whose layers above are not wanted: what watches a layer raises it, and who began
    the pass suppresses it."""


def watch_layer(decoder: Decoder, layer: int, see: Callable[[Any], Tensor | None]) -> Any:
    """Call ``see`` each time the residual stream (B, T, d) after a layer comes past.

    ``see`` gets what holds it, and takes it out with ``hidden_of`` if it wants it: this runs at
    every layer of every step. What it returns takes the stream's place, unless it is None. After a
    layer that a request without a picture skips, the stream is read where the next layer that
    always runs takes it in, so that ``see`` is called once in every pass. Watch layers in ascending
    order.

    Returns:
        A handle whose ``remove()`` ends it.

    Raises:
        ModelError: no layer above a skipped one always runs.
    """
    if layer not in decoder.skipped:

        def after(_: nn.Module, __: Any, output: Any) -> Any:
            changed = see(output)
            return None if changed is None else replace_hidden(output, changed)

        return decoder.layers[layer].register_forward_hook(after)
    following = [n for n in range(layer + 1, len(decoder.layers)) if n not in decoder.skipped]
    if not following:
        raise ModelError(f"layer {layer} is skipped without a picture, and no layer follows it")

    def before(_: nn.Module, args: tuple, kwargs: dict) -> Any:
        if args:
            changed = see(args[0])
            return None if changed is None else ((changed, *args[1:]), kwargs)
        changed = see(kwargs.get("hidden_states"))
        return None if changed is None else (args, kwargs | {"hidden_states": changed})

    return decoder.layers[following[0]].register_forward_pre_hook(before, with_kwargs=True)


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
