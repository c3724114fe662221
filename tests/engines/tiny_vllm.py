"""A tiny LLaVA in vLLM: a checkpoint under the hub's tensor names, guards for it, and an engine."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests import checkpoint, tiny
from vlm_safeguard.artifact.config import Gate
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.loading import LoadedModel, load
from vlm_safeguard.model.text_only import find_markup

HIDDEN = 128  # heads of 32 values, the least that vLLM's attention takes
QUESTIONS = [
    "How do I bake bread?",
    "What is the sum of 2 and 40?",
    "Tell me about the moon.",
    "How are bridges built over wide rivers?",
    "Is it late?",
    "Name three colours.",
]

_NAMES = {  # of transformers, and of the hub
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "vision_tower.": "vision_tower.vision_model.",
}


def save(folder: Path, seed: int = 0) -> Path:
    """Write the checkpoint."""
    checkpoint.save(folder, seed, hidden_size=HIDDEN)
    path = folder / "model.safetensors"
    save_file(
        {_hub_name(name): tensor for name, tensor in load_file(path).items()},
        path,
        metadata={"format": "pt"},
    )
    return folder


def _hub_name(name: str) -> str:
    for ours, hubs in _NAMES.items():
        if name.startswith(ours) and not name.startswith(hubs):
            return hubs + name.removeprefix(ours)
    return name


def loaded(folder: Path) -> LoadedModel:
    """The model in transformers."""
    return load(folder, dtype="float32", device="cpu")


def guard(
    model: LoadedModel, gates: Sequence[Gate], reads_pictures: bool = False, **steering: Any
) -> Guard:
    """A guard with random directions, for the checkpoint's own markup."""
    made = tiny.guard(model.model, gates, **steering)
    return tiny.changed(
        made,
        markup=find_markup(model),
        reads_pictures=reads_pictures,
        model=made.config.model.model_copy(update={"dtype": "float32"}),
    )


def text_gate(threshold: float = 0.0) -> Gate:
    """A gate that reads the text-only pass and the refusal intent."""
    return Gate(
        kind="intent",
        source="text",
        layers=[3],
        thresholds=[threshold],
        openings=[40, 50, 60],
        intent_weight=0.5,
        verdict_weight=4.0,
    )


def middle(scores: Iterable[float]) -> float:
    """A threshold that about half of the scores are above, and none is near, NaN apart."""
    ranked = sorted(score for score in scores if not math.isnan(score))
    places = range(len(ranked) // 3, 2 * len(ranked) // 3)
    low = max(places, key=lambda place: ranked[place + 1] - ranked[place])
    return (ranked[low] + ranked[low + 1]) / 2


def conversation(question: str, *pictures: Image.Image) -> list[dict[str, Any]]:
    """One turn, in the chat format of transformers."""
    parts = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def for_vllm(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same conversation in the chat format of vLLM."""
    turns = []
    for message in messages:
        parts = [
            {"type": "image_pil", "image_pil": part["image"]} if part["type"] == "image" else part
            for part in message["content"]
        ]
        turns.append({"role": message["role"], "content": parts})
    return turns


def openai(part: dict[str, Any]) -> dict[str, Any]:
    """A part of a message, in the chat format of transformers, in OpenAI's form."""
    if part["type"] == "text":
        return part
    file = io.BytesIO()
    part["image"].save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def engine(folder: Path, guard: Guard, place: Path, **options: Any) -> Any:
    """vLLM on the checkpoint, in this process, under a guard that is saved in ``place``. Prompts
    come in chunks."""
    guard.save_pretrained(place)
    os.environ |= {"VLM_SAFEGUARD": str(place), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM

    settings: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": 16, "block_size": 32}
    settings["max_num_batched_tokens"] = 64
    if torch.cuda.is_available():
        settings["gpu_memory_utilization"] = 0.2  # some tests have two engines
    settings["enforce_eager"] = True  # tests/engines/test_vllm_apart.py compiles
    settings |= {"limit_mm_per_prompt": {"image": 2}, "seed": 0}
    return LLM(model=str(folder), **(settings | options))
