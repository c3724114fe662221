"""InternVL and Aya Vision: tiles with a wrapper."""

from __future__ import annotations

from typing import Any

import transformers as tf

from tests.families.base import (
    FIRST_SPECIAL,
    MEAN,
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


def _tiles(**more: Any) -> Any:
    return tf.GotOcr2ImageProcessorPil(
        size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4, **MEAN, **more
    )


@family("InternVL", markup=(("<IMG_CONTEXT>",), "<img>", "</img>\n"))
def internvl() -> LoadedModel:
    specials = ["<IMG_CONTEXT>", "<img>", "</img>", "<video>"]
    config = tf.InternVLConfig(
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "image_size": [24, 24],
            "patch_size": [6, 6],
        },
        text_config=tf.Qwen2Config(**TEXT),
        image_token_id=FIRST_SPECIAL,
        image_seq_length=4,
    )
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    processor = without_video(tf.InternVLProcessor)(
        _tiles(),
        tokenizer(specials, **named),
        image_seq_length=4,
        chat_template=template("<IMG_CONTEXT>\n"),
    )
    return ready(tf.InternVLForConditionalGeneration(config), processor, "tiny InternVL")


AYA = ("<|IMG_PATCH|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "TILE_GLOBAL")
AYA += tuple(f"TILE_{n}" for n in range(1, 13))


@family("Aya Vision", markup=(AYA, "", ""))
def aya_vision() -> LoadedModel:
    specials = [*AYA, "<image>", "<|IMG_LINE_BREAK|>"]
    config = tf.AyaVisionConfig(
        vision_config=tf.SiglipVisionConfig(**VISION | {"patch_size": 6}),
        text_config=tf.Cohere2Config(**TEXT, sliding_window=16),
        image_token_index=FIRST_SPECIAL,
        adapter_intermediate_size=24,
    )
    processor = tf.AyaVisionProcessor(
        _tiles(),
        tokenizer(specials),
        patch_size=6,
        img_size=24,
        downsample_factor=2,
        chat_template=template("<image>"),
    )
    return ready(tf.AyaVisionForConditionalGeneration(config), processor, "tiny Aya Vision")
