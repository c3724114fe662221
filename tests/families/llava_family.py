"""LLaVA and its kin."""

from __future__ import annotations

from typing import Any

import transformers as tf

from tests.families.base import (
    FIRST_SPECIAL,
    SQUARE,
    TEXT,
    VISION,
    family,
    ready,
    template,
    tokenizer,
    without_video,
)
from vlm_safeguard.model.loading import LoadedModel


def _clip() -> Any:
    return tf.CLIPImageProcessorPil(do_resize=True, size=SQUARE, do_center_crop=False)


def _tiles() -> Any:
    return tf.LlavaNextImageProcessorPil(
        size={"shortest_edge": 24}, crop_size=SQUARE, image_grid_pinpoints=GRID
    )


@family("LLaVA", markup=(("<image>",), "", "\n"))
def llava() -> LoadedModel:
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_id=FIRST_SPECIAL,
    )
    processor = tf.LlavaProcessor(
        _clip(),
        tokenizer(["<image>"]),
        patch_size=12,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>\n"),
    )
    return ready(tf.LlavaForConditionalGeneration(config), processor, "tiny LLaVA")


@family("VipLLaVA", markup=(("<image>",), "", "\n"))
def vipllava() -> LoadedModel:
    config = tf.VipLlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_id=FIRST_SPECIAL,
        vision_feature_layers=[-2, -1],
    )
    processor = tf.LlavaProcessor(
        _clip(),
        tokenizer(["<image>"]),
        patch_size=12,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>\n"),
    )
    return ready(tf.VipLlavaForConditionalGeneration(config), processor, "tiny VipLLaVA")


GRID = [[24, 24], [24, 48], [48, 24]]


@family("LLaVA-NeXT", markup=(("<image>",), "", "\n"))
def llava_next() -> LoadedModel:
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=tf.MistralConfig(**TEXT),
        image_token_id=FIRST_SPECIAL,
        image_grid_pinpoints=GRID,
    )
    processor = tf.LlavaNextProcessor(
        _tiles(),
        tokenizer(["<image>"]),
        patch_size=12,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>\n"),
    )
    return ready(tf.LlavaNextForConditionalGeneration(config), processor, "tiny LLaVA-NeXT")


@family("Granite 4 Vision", markup=(("<image>",), "", "\n"))
def granite4_vision() -> LoadedModel:
    """Features of the picture are added to the states above several layers."""
    text = {key: value for key, value in TEXT.items() if key != "head_dim"}
    config = tf.Granite4VisionConfig(
        vision_config=tf.SiglipVisionConfig(**VISION | {"hidden_size": 64, "patch_size": 6}),
        text_config=tf.Granite4VisionTextConfig(**text),
        image_token_index=FIRST_SPECIAL,
        image_grid_pinpoints=GRID,
        vision_feature_select_strategy="full",
        downsample_rate="1/2",
        deepstack_layer_map=[[-1, 0], [0, 1]],
        spatial_target_layers=[0, 1, 2, 3],
    )
    processor = tf.Granite4VisionProcessor(
        _tiles(),
        tokenizer(["<image>"]),
        patch_size=6,
        vision_feature_select_strategy="full",
        downsample_rate="1/2",
        chat_template=template("<image>\n"),
    )
    model = tf.Granite4VisionForConditionalGeneration(config)
    return ready(model, processor, "tiny Granite 4 Vision")


@family("LLaVA-NeXT-Video", markup=(("<image>",), "", "\n"))
def llava_next_video() -> LoadedModel:
    config = tf.LlavaNextVideoConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_index=FIRST_SPECIAL,
        video_token_index=FIRST_SPECIAL + 1,
        image_grid_pinpoints=GRID,
        image_seq_length=4,
    )
    processor = without_video(tf.LlavaNextVideoProcessor)(
        None,
        _tiles(),
        tokenizer(["<image>", "<video>"]),
        patch_size=12,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>\n"),
    )
    model = tf.LlavaNextVideoForConditionalGeneration(config)
    return ready(model, processor, "tiny LLaVA-NeXT-Video")


@family("LLaVA-OneVision", markup=(("<image>",), "", "\n"))
def llava_onevision() -> LoadedModel:
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**VISION),
        text_config=tf.Qwen2Config(**TEXT),
        image_token_id=FIRST_SPECIAL,
        video_token_id=FIRST_SPECIAL + 1,
        image_grid_pinpoints=GRID,
    )
    processor = without_video(tf.LlavaOnevisionProcessor)(
        tf.LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=GRID),
        tokenizer(["<image>", "<video>"]),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=template("<image>\n"),
    )
    return ready(
        tf.LlavaOnevisionForConditionalGeneration(config), processor, "tiny LLaVA-OneVision"
    )
