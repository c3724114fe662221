"""Qwen-VL: positions in three dimensions."""

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
from vlm_safeguard.model.loading import LoadedModel

QWEN = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
QWEN_IDS = {
    "vision_start_token_id": FIRST_SPECIAL,
    "vision_end_token_id": FIRST_SPECIAL + 1,
    "image_token_id": FIRST_SPECIAL + 2,
    "video_token_id": FIRST_SPECIAL + 3,
}
QWEN_MARKUP = (("<|image_pad|>",), "<|vision_start|>", "<|vision_end|>")
QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


def mrope(*section: int, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section)}
    return {"rope_parameters": rope | more}


def _qwen_pictures() -> Any:
    return tf.Qwen2VLImageProcessorPil(
        patch_size=8, size={"shortest_edge": 256, "longest_edge": 4096}, merge_size=2
    )


@family("Qwen2-VL", markup=QWEN_MARKUP)
def qwen2_vl() -> LoadedModel:
    config = tf.Qwen2VLConfig(
        text_config=TEXT | mrope(1, 1, 2),
        vision_config={
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": WIDTH,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 8,
        },
        **QWEN_IDS,
    )
    processor = without_video(tf.Qwen2VLProcessor)(
        _qwen_pictures(), tokenizer(QWEN), chat_template=template(QWEN_PICTURE)
    )
    return ready(tf.Qwen2VLForConditionalGeneration(config), processor, "tiny Qwen2-VL")


@family("Qwen2.5-VL", markup=QWEN_MARKUP)
def qwen2_5_vl() -> LoadedModel:
    config = tf.Qwen2_5_VLConfig(
        text_config=TEXT | mrope(1, 1, 2),
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": WIDTH,
            "num_heads": 2,
            "patch_size": 8,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        **QWEN_IDS,
    )
    processor = without_video(tf.Qwen2_5_VLProcessor)(
        _qwen_pictures(), tokenizer(QWEN), chat_template=template(QWEN_PICTURE)
    )
    return ready(tf.Qwen2_5_VLForConditionalGeneration(config), processor, "tiny Qwen2.5-VL")


@family("Qwen3-VL", markup=QWEN_MARKUP)
def qwen3_vl() -> LoadedModel:
    config = tf.Qwen3VLConfig(
        text_config=TEXT | mrope(2, 1, 1),
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": WIDTH,
            "num_heads": 2,
            "patch_size": 8,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        **QWEN_IDS,
    )
    processor = without_video(tf.Qwen3VLProcessor)(
        _qwen_pictures(), tokenizer(QWEN), chat_template=template(QWEN_PICTURE)
    )
    return ready(tf.Qwen3VLForConditionalGeneration(config), processor, "tiny Qwen3-VL")


@family("Qwen3-VL-MoE", markup=QWEN_MARKUP)
def qwen3_vl_moe() -> LoadedModel:
    experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    config = tf.Qwen3VLMoeConfig(
        text_config=TEXT | mrope(2, 1, 1) | experts,
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": WIDTH,
            "num_heads": 2,
            "patch_size": 8,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        **QWEN_IDS,
    )
    processor = without_video(tf.Qwen3VLProcessor)(
        _qwen_pictures(), tokenizer(QWEN), chat_template=template(QWEN_PICTURE)
    )
    return ready(tf.Qwen3VLMoeForConditionalGeneration(config), processor, "tiny Qwen3-VL-MoE")


@family("Qwen3.5", markup=QWEN_MARKUP)
def qwen3_5() -> LoadedModel:
    linear = {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_conv_kernel_dim": 4,
    }
    config = tf.Qwen3_5Config(
        text_config=TEXT | mrope(2, 1, 1) | linear,
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": WIDTH,
            "num_heads": 2,
            "patch_size": 8,
            "num_position_embeddings": 16,
        },
        **QWEN_IDS,
    )
    processor = without_video(tf.Qwen3VLProcessor)(
        _qwen_pictures(), tokenizer(QWEN), chat_template=template(QWEN_PICTURE)
    )
    return ready(tf.Qwen3_5ForConditionalGeneration(config), processor, "tiny Qwen3.5")
