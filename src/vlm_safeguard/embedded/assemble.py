"""Assemble an embedded VLM: a standard LLaVA checkpoint in the user's cache.

The language model comes from its GGUF file (``base_llm``) and is not changed. What this project
trained, projector and vision tower, ships with the package. The result is a plain
``LlavaForConditionalGeneration`` folder that needs no code of ours to load.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaProcessor,
    PretrainedConfig,
)

from vlm_safeguard.embedded.base_llm import (
    QWEN25_CODER_05B,
    QWEN25_CODER_15B,
    BaseLLM,
    fetch_gguf,
    read_gguf,
    sha256_file,
)
from vlm_safeguard.embedded.cache import Progress, sole_writer
from vlm_safeguard.errors import DemoError, GuardError

FOLDER = "{name}-vlm-{key}"  # of an assembled model
STAMP = "assembled.json"
FORMAT = 2  # raise it when write_checkpoint writes something else
ASSEMBLING = "assembling"  # what ``sole_writer`` calls the work
PROJECTOR, TOWER = "projector.safetensors", "tower.safetensors"
VISION, TEMPLATE = "vision_config.json", "chat_template.jinja"
SHARED = (TOWER, VISION, TEMPLATE)  # by all embedded models
BESIDE = "tower_sha256"  # in a projector's metadata: the tower that it was trained beside


@dataclass(frozen=True)
class EmbeddedModel:
    """An embedded VLM.

    ``own``: the folder beside this file with what is the model's alone. ``needed``: bytes of disk
    that assembly takes.
    """

    name: str
    base: BaseLLM
    own: str
    needed: int
    image_token: str = "<|image_pad|>"  # stands for a picture, a token of the language model

    def resource(self, name: str) -> Path:
        """What ships with the package: its ``PROJECTOR``, ``CARD.md`` and, for some models, the
        folder ``guard``; and what is ``SHARED``."""
        folder = "qwen25_coder" if name in SHARED else self.own
        return Path(str(files("vlm_safeguard.embedded") / folder / name))


MODELS = {
    model.name: model
    for model in (
        EmbeddedModel("embedded", QWEN25_CODER_05B, "qwen25_coder_05b", 4_000_000_000),
        EmbeddedModel("embedded-1.5b", QWEN25_CODER_15B, "qwen25_coder_15b", 11_000_000_000),
    )
}


def default_cache() -> Path:
    """``$VLM_SAFEGUARD_CACHE``, else ``vlm-safeguard`` in the user's cache folder."""
    own = os.environ.get("VLM_SAFEGUARD_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).expanduser() / "vlm-safeguard"


def assemble(
    name: str = "embedded", cache: Path | None = None, progress: Progress = lambda _: None
) -> Path:
    """The folder of an embedded model, made on first use and checked on every later one.

    ``name``: one of ``MODELS``. ``cache``: ``default_cache()`` if none is given. It is locked and
    written to only if it does not have the folder; another process that is assembling is waited
    for. Needs the network only if the language model's file is not there yet (see ``fetch_gguf``).
    Interrupted at any moment it leaves no folder behind that looks finished.

    Raises:
        DemoError: no such model, a package is missing, no network at first use, a file with a wrong
            digest or that cannot be read, no room on the disk, or no right to write to ``cache``.
    """
    if name not in MODELS:
        raise DemoError(f"there is no embedded model {name!r}: use one of {', '.join(MODELS)}")
    model = MODELS[name]
    cache = default_cache() if cache is None else cache
    for resource in (PROJECTOR, *SHARED):
        if not model.resource(resource).is_file():
            raise DemoError(f"{resource} is missing from the package: reinstall vlm-safeguard")
    folder = cache / FOLDER.format(name=name, key=_key(model))
    if _intact(folder):
        return folder
    if find_spec("gguf") is None or find_spec("accelerate") is None:
        raise DemoError("assembling needs gguf and accelerate: pip install 'vlm-safeguard[demo]'")
    with sole_writer(cache, ASSEMBLING, f"the model {name!r}", progress):
        if not _intact(folder):  # another process may have made it meanwhile
            _make(model, folder, progress)
    return folder


def _make(model: EmbeddedModel, folder: Path, progress: Progress) -> None:
    """Write the folder under a temporary name, and give it its own when it is finished."""
    if folder.exists():
        progress("the assembled model is damaged; making it again")
        shutil.rmtree(folder)
    _check_room(model, folder.parent)
    source = fetch_gguf(model.base, folder.parent, progress)
    work = folder.with_name(f".{ASSEMBLING}-{folder.name}")
    try:
        work.mkdir()
        progress(f"reading {model.base.name}")
        config, state, tokenizer = read_gguf(source, model.base.pad_token)
        progress("adding the trained weights")
        projector, tower = (load_file(model.resource(name)) for name in (PROJECTOR, TOWER))
        write_checkpoint(work, model, config, state, tokenizer, projector, tower)
        progress("checking")
        stamp = {p.name: sha256_file(p) for p in sorted(work.iterdir())}
        (work / STAMP).write_text(json.dumps({"gguf": model.base.sha256, "files": stamp}))
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check_room(model: EmbeddedModel, cache: Path) -> None:
    free = shutil.disk_usage(cache).free
    if free < model.needed:
        raise DemoError(
            f"assembling the model {model.name!r} needs {model.needed / 1e9:.1f} GB in {cache}, "
            f"{free / 1e9:.1f} GB are free. Make room or set VLM_SAFEGUARD_CACHE"
        )


def resolve(name: str, progress: Progress = lambda _: None) -> str | Path:
    """What to load for ``name``: the folder of an embedded model, or the name as it is."""
    return assemble(name, progress=progress) if name in MODELS else name


def guard_folder(name: str | Path) -> Path:
    """The folder ``name``, or that of the guard that ships for the embedded model ``name``.

    Raises:
        GuardError: none ships for it.
    """
    folder = Path(name)
    if str(name) not in MODELS or os.path.lexists(folder):
        return folder
    shipped = MODELS[str(name)].resource("guard")
    if not shipped.is_dir():
        raise GuardError(
            f"no guard ships for the model {str(name)!r}: make one with `vlm-safeguard calibrate "
            f"{name} -o guard` and name it"
        )
    return shipped


def name_of(folder: str) -> str:
    """The embedded model's name for the name of its folder; any other name as it is."""
    begin = folder.rpartition("-vlm-")[0]
    return begin if begin in MODELS else folder


def _key(model: EmbeddedModel) -> str:
    """Names everything that the folder is made of."""
    digest = hashlib.sha256(f"format {FORMAT} {model.base.sha256}".encode())
    for name in (PROJECTOR, *SHARED):
        digest.update(sha256_file(model.resource(name)).encode())
    return digest.hexdigest()[:12]


def _intact(folder: Path) -> bool:
    """Whether every file of an assembled folder still has its digest."""
    try:
        stamp = json.loads((folder / STAMP).read_text())["files"]
        found = {name: sha256_file(folder / name) for name in stamp}
        return bool(found) and found == stamp
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_checkpoint(
    folder: Path,
    model: EmbeddedModel,
    text: PretrainedConfig,
    state: dict[str, Tensor],
    tokenizer: Any,
    projector: dict[str, Tensor],
    tower: dict[str, Tensor],
) -> None:
    """Write model and processor to ``folder`` under the hub's tensor names.

    Args:
        text: configuration of the language model. state: its tensors. tokenizer: its own.
        projector, tower: tensors that the project trained.
    """
    image_id = tokenizer.convert_tokens_to_ids(model.image_token)
    text.bos_token_id, text.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    vision = CLIPVisionConfig(**json.loads(model.resource(VISION).read_text()))
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=image_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = "float32"
    if text.tie_word_embeddings:
        state = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    whole = {f"language_model.{name}": tensor for name, tensor in state.items()}
    whole |= {f"multi_modal_projector.{k}": v.float() for k, v in projector.items()}
    whole |= {f"vision_tower.vision_model.{k}": v.float() for k, v in tower.items()}
    _save(whole, folder / "model.safetensors")
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
        chat_template=model.resource(TEMPLATE).read_text("utf-8"),
        image_token=model.image_token,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in model.base.end_tokens]
    generation = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": tokenizer.pad_token_id,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a file that others may read, as the rest of the folder.

    Raises:
        OSError: it cannot be written. safetensors has an error of its own for that.
    """
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file(whole, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(0o644)  # safetensors lets only the owner read
