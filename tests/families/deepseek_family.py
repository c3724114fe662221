"""DeepSeek-VL."""

from __future__ import annotations

import transformers as tf

from tests.families.base import (
    FIRST_SPECIAL,
    MEAN,
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
