"""Ovis2: a picture becomes weights over a visual vocabulary."""

from __future__ import annotations

import transformers as tf

from tests.families.base import (
    FIRST_SPECIAL,
    MEAN,
    SQUARE,
    TEXT,
    VISION,
    VOCAB,
    WIDTH,
    family,
    ready,
    template,
    tokenizer,
)
from vlm_safeguard.model.loading import LoadedModel

INDICATORS = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]


@family("Ovis2", markup=(("<IMG_ATOM>", *INDICATORS[1:4]), "<IMG_START>", "<IMG_END>\n"))
def ovis2() -> LoadedModel:
    specials = ["<IMG_ATOM>", *INDICATORS, "<image>"]
    config = tf.Ovis2Config(
        vision_config=VISION | {"vocab_size": 20, "num_visual_indicator_tokens": 5},
        text_config=tf.Qwen2Config(**TEXT),
        image_token_id=FIRST_SPECIAL,
        visual_indicator_token_ids=[FIRST_SPECIAL + n for n in range(1, 6)],
        hidden_size=WIDTH,
        vocab_size=VOCAB,
    )
    processor = tf.Ovis2Processor(
        tf.Ovis2ImageProcessorPil(size=SQUARE, crop_to_patches=True, max_patches=4, **MEAN),
        tokenizer(specials),
        image_seq_length=4,
        chat_template=template("<image>\n"),
    )
    return ready(tf.Ovis2ForConditionalGeneration(config), processor, "tiny Ovis2")
