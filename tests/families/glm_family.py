"""GLM-4V."""

from __future__ import annotations

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


@family("GLM-4V", markup=(("<|image|>",), "<|begin_of_image|>", "<|end_of_image|>"))
def glm4v() -> LoadedModel:
    specials = ["<|image|>", "<|begin_of_image|>", "<|end_of_image|>", "<|video|>"]
    specials += ["<|begin_of_video|>", "<|end_of_video|>"]
    text = {key: value for key, value in TEXT.items() if key != "head_dim"}
    config = tf.Glm4vConfig(
        text_config=text | mrope(1, 1, 2, partial_rotary_factor=1.0),
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": WIDTH,
            "num_heads": 2,
            "patch_size": 8,
            "image_size": 32,
        },
        image_token_id=FIRST_SPECIAL,
        image_start_token_id=FIRST_SPECIAL + 1,
        image_end_token_id=FIRST_SPECIAL + 2,
        video_token_id=FIRST_SPECIAL + 3,
        video_start_token_id=FIRST_SPECIAL + 4,
        video_end_token_id=FIRST_SPECIAL + 5,
    )
    processor = without_video(tf.Glm4vProcessor)(
        tf.Glm4vImageProcessorPil(
            patch_size=8, size={"shortest_edge": 512, "longest_edge": 8192}, merge_size=2
        ),
        tokenizer(specials),
        chat_template=template("<|begin_of_image|><|image|><|end_of_image|>"),
    )
    return ready(tf.Glm4vForConditionalGeneration(config), processor, "tiny GLM-4V")
