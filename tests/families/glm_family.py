"""GLM-4V and those after it."""

from __future__ import annotations

from typing import Any

import transformers as tf

from tests.families.base import (
    FIRST_SPECIAL,
    TEXT,
    WIDTH,
    family,
    ready,
    template,
    tokenizer,
    without_video,
)
from tests.families.qwen_family import mrope
from vlm_safeguard.model.loading import LoadedModel

TOKENS = ["<|image|>", "<|begin_of_image|>", "<|end_of_image|>", "<|video|>"]
TOKENS += ["<|begin_of_video|>", "<|end_of_video|>"]
NAMES = ("image", "image_start", "image_end", "video", "video_start", "video_end")
IDS = {f"{name}_token_id": FIRST_SPECIAL + place for place, name in enumerate(NAMES)}
MARKUP = (("<|image|>",), "<|begin_of_image|>", "<|end_of_image|>")
EXPERTS = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "out_hidden_size": WIDTH,
    "num_heads": 2,
    "patch_size": 8,
    "image_size": 32,
}


def _text(**more: Any) -> dict[str, Any]:
    return TEXT | mrope(1, 1, 2, partial_rotary_factor=1.0) | more


def _made(model: Any, processor: Any, pictures: Any, name: str) -> LoadedModel:
    size = {"shortest_edge": 512, "longest_edge": 8192}
    made = without_video(processor)(
        pictures(patch_size=8, size=size, merge_size=2),
        tokenizer(TOKENS),
        chat_template=template("<|begin_of_image|><|image|><|end_of_image|>"),
    )
    return ready(model, made, f"tiny {name}")


@family("GLM-4V", markup=MARKUP)
def glm4v() -> LoadedModel:
    text = {key: value for key, value in _text().items() if key != "head_dim"}
    config = tf.Glm4vConfig(text_config=text, vision_config=VISION, **IDS)
    model = tf.Glm4vForConditionalGeneration(config)
    return _made(model, tf.Glm4vProcessor, tf.Glm4vImageProcessorPil, "GLM-4V")


@family("GLM-4.5V", markup=MARKUP)
def glm4v_moe() -> LoadedModel:
    config = tf.Glm4vMoeConfig(text_config=_text(**EXPERTS), vision_config=VISION, **IDS)
    model = tf.Glm4vMoeForConditionalGeneration(config)
    return _made(model, tf.Glm4vProcessor, tf.Glm4vImageProcessorPil, "GLM-4.5V")


@family("GLM-4.6V", markup=MARKUP)
def glm46v() -> LoadedModel:
    text = _text(**EXPERTS, model_type="glm4v_moe_text")
    vision = VISION | {"model_type": "glm4v_moe_vision"}
    config = tf.Glm46VConfig(text_config=text, vision_config=vision, **IDS)
    model = tf.Glm46VForConditionalGeneration(config)
    return _made(model, tf.Glm46VProcessor, tf.Glm46VImageProcessorPil, "GLM-4.6V")


@family("GLM-OCR", markup=MARKUP)
def glm_ocr() -> LoadedModel:
    config = tf.GlmOcrConfig(text_config=_text(), vision_config=VISION, **IDS)
    model = tf.GlmOcrForConditionalGeneration(config)
    return _made(model, tf.Glm46VProcessor, tf.Glm46VImageProcessorPil, "GLM-OCR")
