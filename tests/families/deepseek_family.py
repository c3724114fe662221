"""DeepSeek-VL."""

from __future__ import annotations

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
)
from vlm_safeguard.model.loading import LoadedModel

PICTURE = "<image_placeholder>"


@family("DeepSeek-VL", markup=((PICTURE,), "", "\n"))
def deepseek_vl() -> LoadedModel:
    config = tf.DeepseekVLConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_id=FIRST_SPECIAL,
    )
    processor = tf.DeepseekVLProcessor(
        tf.DeepseekVLImageProcessorPil(size={"height": 24, "width": 24}, min_size=4, **MEAN),
        tokenizer([PICTURE], image_token=PICTURE),
        num_image_tokens=4,
        chat_template=template(PICTURE + "\n"),
    )
    return ready(tf.DeepseekVLForConditionalGeneration(config), processor, "tiny DeepSeek-VL")


@family("DeepSeek-VL-Hybrid", markup=((PICTURE,), "", "\n"))
def deepseek_vl_hybrid() -> LoadedModel:
    high = {
        "model_type": "sam_vision_model",
        "hidden_size": 16,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 4,
        "window_size": 2,
        "global_attn_indexes": [1],
        "mlp_dim": 24,
    }
    config = tf.DeepseekVLHybridConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False),
        high_res_vision_config=high,
        text_config=tf.LlamaConfig(**TEXT),
        image_token_id=FIRST_SPECIAL,
    )
    pictures = tf.DeepseekVLHybridImageProcessorPil(
        size=SQUARE, min_size=4, high_res_size={"height": 64, "width": 64}, **MEAN
    )
    processor = tf.DeepseekVLHybridProcessor(
        pictures,
        tokenizer([PICTURE], image_token=PICTURE),
        num_image_tokens=4,
        chat_template=template(PICTURE + "\n"),
    )
    model = tf.DeepseekVLHybridForConditionalGeneration(config)
    return ready(model, processor, "tiny DeepSeek-VL-Hybrid")
