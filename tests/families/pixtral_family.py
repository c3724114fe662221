"""Pixtral's vision tower, alone and in Mistral 3."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any
from unittest.mock import patch

import transformers as tf

from tests.families.base import FIRST_SPECIAL, TEXT, VISION, family, ready, template, tokenizer
from vlm_safeguard.model.loading import LoadedModel

# Modules that ask for torchvision or num2words, of which pictures need neither.
_PIXTRAL = "transformers.models.pixtral"
_pillow = import_module(f"{_PIXTRAL}.image_processing_pil_pixtral")
with patch.dict(sys.modules, {f"{_PIXTRAL}.image_processing_pixtral": _pillow}):
    processing_pixtral = import_module(f"{_PIXTRAL}.processing_pixtral")

PIXTRAL = ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]


def _pixtral(**more: Any) -> Any:
    return processing_pixtral.PixtralProcessor(
        tf.PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size=8),
        tokenizer(PIXTRAL),
        patch_size=8,
        chat_template=template("[IMG]"),
        **more,
    )


def _pixtral_tower() -> Any:
    return tf.PixtralVisionConfig(**VISION | {"patch_size": 8, "image_size": 64})


@family("Pixtral", markup=(("[IMG]", "[IMG_BREAK]"), "", "[IMG_END]"))
def pixtral() -> LoadedModel:
    config = tf.LlavaConfig(
        vision_config=_pixtral_tower(),
        text_config=tf.MistralConfig(**TEXT),
        image_token_id=FIRST_SPECIAL,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return ready(tf.LlavaForConditionalGeneration(config), _pixtral(), "tiny Pixtral")


@family("Mistral 3", markup=(("[IMG]", "[IMG_BREAK]"), "", "[IMG_END]"))
def mistral3() -> LoadedModel:
    config = tf.Mistral3Config(
        vision_config=_pixtral_tower(),
        text_config=tf.MistralConfig(**TEXT),
        image_token_index=FIRST_SPECIAL,
        spatial_merge_size=2,
    )
    processor = _pixtral(spatial_merge_size=2)
    return ready(tf.Mistral3ForConditionalGeneration(config), processor, "tiny Mistral 3")


@family("LightOnOCR", markup=(("<|image_pad|>",), "", ""))
def lighton_ocr() -> LoadedModel:
    config = tf.LightOnOcrConfig(
        vision_config=_pixtral_tower(),
        text_config=tf.Qwen3Config(**TEXT),
        image_token_id=FIRST_SPECIAL,
        spatial_merge_size=2,
    )
    specials = ["<|image_pad|>", "<|vision_pad|>", "<|vision_end|>"]
    names = ("image_token", "image_break_token", "image_end_token")
    processor = tf.LightOnOcrProcessor(
        tf.PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size=16),
        tokenizer(specials, **dict(zip(names, specials, strict=True))),
        patch_size=8,
        spatial_merge_size=2,
        chat_template=template("<|image_pad|>"),
    )
    return ready(tf.LightOnOcrForConditionalGeneration(config), processor, "tiny LightOnOCR")
