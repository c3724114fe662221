"""Qwen-VL: positions in three dimensions."""

from __future__ import annotations

from typing import Any

import transformers as tf

from tests.families.base import (
    FIRST_SPECIAL,
    TEXT,
    VISION,
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
def qwen2_5_vl(width: int = WIDTH) -> LoadedModel:
    sections = (width // 32, width // 32, width // 16)
    config = tf.Qwen2_5_VLConfig(
        text_config=TEXT | {"hidden_size": width, "head_dim": width // 4} | mrope(*sections),
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": width,
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


LINEAR = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
VISION_3_5 = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "out_hidden_size": WIDTH,
    "num_heads": 2,
    "patch_size": 8,
    "num_position_embeddings": 16,
}


def _qwen3_5(config: type, model: type, name: str, **text: Any) -> LoadedModel:
    settings = config(
        text_config=TEXT | mrope(2, 1, 1) | LINEAR | text, vision_config=VISION_3_5, **QWEN_IDS
    )
    processor = without_video(tf.Qwen3VLProcessor)(
        _qwen_pictures(), tokenizer(QWEN), chat_template=template(QWEN_PICTURE)
    )
    return ready(model(settings), processor, name)


@family("Qwen3.5", markup=QWEN_MARKUP)
def qwen3_5() -> LoadedModel:
    return _qwen3_5(tf.Qwen3_5Config, tf.Qwen3_5ForConditionalGeneration, "tiny Qwen3.5")


@family("Qwen3.5-MoE", markup=QWEN_MARKUP)
def qwen3_5_moe() -> LoadedModel:
    experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    model = tf.Qwen3_5MoeForConditionalGeneration
    more = experts | {"shared_expert_intermediate_size": 16}
    return _qwen3_5(tf.Qwen3_5MoeConfig, model, "tiny Qwen3.5-MoE", **more)


@family("EXAONE 4.5", markup=(("<|image_pad|>",), "<vision>", "</vision>"))
def exaone4_5() -> LoadedModel:
    text = TEXT | {"model_type": "exaone4", "sliding_window": 16, "sliding_window_pattern": 2}
    config = tf.Exaone4_5_Config(
        text_config=text,
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": WIDTH,
            "num_heads": 2,
            "num_key_value_heads": 2,
            "patch_size": 8,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=FIRST_SPECIAL + 2,
        video_token_id=FIRST_SPECIAL + 3,
    )
    processor = without_video(tf.Exaone4_5_Processor)(
        _qwen_pictures(),
        tokenizer(["<vision>", "</vision>", *QWEN[2:]]),
        chat_template=template("<vision><|image_pad|></vision>"),
    )
    return ready(tf.Exaone4_5_ForConditionalGeneration(config), processor, "tiny EXAONE 4.5")


@family("VideoLLaMA 3", markup=(("<image>",), "", "\n"))
def video_llama_3() -> LoadedModel:
    config = tf.VideoLlama3Config(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 8,
        },
        text_config=tf.Qwen2Config(**TEXT),
        image_token_id=FIRST_SPECIAL,
        video_token_id=FIRST_SPECIAL + 1,
    )
    processor = without_video(tf.VideoLlama3Processor)(
        tf.VideoLlama3ImageProcessorPil(
            patch_size=8, min_pixels=256, max_pixels=4096, merge_size=1
        ),
        tokenizer(["<image>", "<|video_pad|>"], image_token="<image>"),
        chat_template=template("<image>\n"),
    )
    model = tf.VideoLlama3ForConditionalGeneration(config)
    return ready(model, processor, "tiny VideoLLaMA 3")


PADDLE = ["<|IMAGE_START|>", "<|IMAGE_END|>", "<|IMAGE_PLACEHOLDER|>", "<|video_pad|>"]


@family("PaddleOCR-VL", markup=((PADDLE[2],), PADDLE[0], PADDLE[1]))
def paddleocr_vl() -> LoadedModel:
    config = tf.PaddleOCRVLConfig(
        text_config=TEXT | mrope(1, 1, 2),
        vision_config=VISION | {"patch_size": 6},
        **QWEN_IDS,
    )
    size = {"shortest_edge": 144, "longest_edge": 2304}
    processor = tf.PaddleOCRVLProcessor(
        tf.PaddleOCRVLImageProcessorPil(patch_size=6, size=size, merge_size=2),
        tokenizer(PADDLE, image_token=PADDLE[2]),
        chat_template=template(PADDLE[0] + PADDLE[2] + PADDLE[1]),
    )
    model = tf.PaddleOCRVLForConditionalGeneration(config)
    return ready(model, processor, "tiny PaddleOCR-VL")
