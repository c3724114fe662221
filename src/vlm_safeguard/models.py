"""Load a vision-language model and its processor, and find its decoder, verified."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.modeling_outputs import ModelOutput

from vlm_safeguard.errors import ModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Decoder:
    """The verified language decoder of a VLM. ``path`` is its name inside the model."""

    module: nn.Module
    layers: nn.ModuleList
    path: str
    hidden_size: int


@dataclass
class LoadedModel:
    """A model ready for inference with its processor, and where it came from."""

    model: Any
    processor: Any
    name: str

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device


def load(name: str | Path, dtype: str = "float32", device: str = "cpu") -> LoadedModel:
    """Load a VLM and its processor from a folder or a hub name (network only if not a folder).

    Raises:
        ModelError: the folder is missing or not a model's, the model takes no images, custom
            code would have to run, or the weights cannot be read.
    """
    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}: use one of {', '.join(DTYPES)}")
    local = _local_folder(str(name))
    name = Path(name).expanduser() if local else name
    options = {"local_files_only": True} if local else {}
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
    return LoadedModel(model.to(device).eval(), processor, str(name))


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

    ``get_decoder()`` may silently return the model itself and a search by module lists may find
    the vision tower, so whatever is found must have the text configuration's number of layers and
    must not lie inside the vision tower. What cannot be verified is refused, never guessed.

    Raises:
        ModelError: no decoder could be verified.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_decoder"):
        raise ModelError(f"{name} is not a transformers model with a decoder")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder model: its decoder is not a residual LLM")
    text = config.get_text_config(decoder=True)
    module = model.get_decoder()
    layers = getattr(module, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != text.num_hidden_layers:
        found = len(layers) if isinstance(layers, nn.ModuleList) else "no"
        raise ModelError(
            f"cannot verify the decoder of {name}: get_decoder() has {found} layers, its text "
            f"configuration says {text.num_hidden_layers}"
        )
    path = next((n for n, m in model.named_modules() if m is module), None)
    if path is None or "vision" in path:
        raise ModelError(f"cannot verify the decoder of {name}: it lies at {path!r}")
    return Decoder(module, layers, path, text.hidden_size)


def hidden_of(output: Tensor | tuple | ModelOutput) -> Tensor:
    """The residual stream in a decoder layer's output: a Tensor, or the first of a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def replace_hidden(output: Tensor | tuple, hidden: Tensor) -> Tensor | tuple:
    """A layer output of the same kind with another residual stream."""
    return hidden if isinstance(output, Tensor) else (hidden, *output[1:])


def conversation(prompt: str, images: int = 0) -> list[dict[str, Any]]:
    """One user turn in the chat format that processors' templates take, pictures first."""
    parts: list[dict[str, Any]] = [{"type": "image"} for _ in range(images)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]


def encode(
    loaded: LoadedModel, prompts: Sequence[str], pictures: Sequence[Image.Image | None]
) -> dict[str, Tensor]:
    """Model inputs for a batch of single-turn requests, each with one picture or none.

    Left-padded, on the model's device. Prompts pass through the chat template. Control tokens
    typed by a user are neutralised so that a prompt cannot open a turn of its own.
    """
    processor = loaded.processor
    texts = [
        processor.apply_chat_template(
            conversation(neutralise(processor.tokenizer, prompt), 0 if picture is None else 1),
            add_generation_prompt=True,
            tokenize=False,
        )
        for prompt, picture in zip(prompts, pictures, strict=True)
    ]
    images = [picture for picture in pictures if picture is not None]
    options: dict[str, Any] = {"images": images} if images else {}
    batch = processor(
        text=texts, padding=True, return_tensors="pt", add_special_tokens=False, **options
    )
    return {
        key: value.to(loaded.device) for key, value in batch.items() if isinstance(value, Tensor)
    }


def neutralise(tokenizer: Any, prompt: str) -> str:
    """Break every special token that stands in user text with a zero-width space."""
    for token in sorted(tokenizer.get_added_vocab(), key=len, reverse=True):
        if len(token) > 1 and token in prompt:
            prompt = prompt.replace(token, token[0] + "\u200b" + token[1:])
    return prompt


def config_digest(model: Any) -> str:
    """SHA-256 of the architecture: what decides the shape of the computation, and no defaults
    that another version of transformers may add."""
    names: tuple[str, ...] = (
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    names += ("num_key_value_heads", "intermediate_size", "vocab_size", "hidden_act")
    names += ("image_size", "patch_size", "image_token_id", "vision_feature_layer")
    names += ("vision_feature_select_strategy", "rope_parameters", "rms_norm_eps")
    whole = model.config
    parts = {"model": whole, "text": whole.get_text_config(decoder=True)}
    parts["vision"] = getattr(whole, "vision_config", None)
    facts = {
        part: {name: getattr(config, name, None) for name in names}
        for part, config in parts.items()
    }
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def weights_digest(model: Any) -> str:
    """SHA-256 over a sample of every parameter, the same for float32 and bfloat16.

    Vision tower and projector count too: the in-VLM gate's threshold rests on them. Sixty-four
    values of each parameter, spread over it, rounded to bfloat16: cheap enough to
    check on every attach; training of any length changes some of them.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        step = max(1, flat.numel() // 64)
        values = flat[::step][:64].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(name.encode() + bytes(values.numpy().tobytes()))
    return digest.hexdigest()


def template_digest(processor: Any) -> str:
    """SHA-256 of the chat template."""
    return hashlib.sha256(str(processor.chat_template).encode()).hexdigest()
