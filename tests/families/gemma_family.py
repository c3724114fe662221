"""Gemma 3 and PaliGemma: attention masks of their own."""

from __future__ import annotations

import transformers as tf

from tests.families.base import (
    FIRST_SPECIAL,
    SQUARE,
    TEXT,
    VISION,
    WIDTH,
    family,
    ready,
    template,
    tokenizer,
)
from vlm_safeguard.model.loading import LoadedModel


@family("Gemma 3", markup=(("<image_soft_token>",), "\n\n<start_of_image>", "<end_of_image>\n\n"))
def gemma3(newlines: bool = False) -> LoadedModel:
    specials = ["<image_soft_token>", "<start_of_image>", "<end_of_image>"]
    config = tf.Gemma3Config(
        vision_config=tf.SiglipVisionConfig(**VISION),
        text_config=tf.Gemma3TextConfig(**TEXT, sliding_window=16, query_pre_attn_scalar=8),
        image_token_index=FIRST_SPECIAL,
        boi_token_index=FIRST_SPECIAL + 1,
        eoi_token_index=FIRST_SPECIAL + 2,
        mm_tokens_per_image=4,
    )
    named = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    processor = tf.Gemma3Processor(
        tf.Gemma3ImageProcessorPil(size=SQUARE),
        tokenizer(specials, newlines=newlines, **named),
        image_seq_length=4,
        chat_template=template("<start_of_image>").replace(
            ": ", "{{ '\\n' }}" if newlines else ": "
        ),
    )
    return ready(tf.Gemma3ForConditionalGeneration(config), processor, "tiny Gemma 3")


@family("PaliGemma", markup=(("<image>",), "", ""), both_ways=True, mixed=False, text_alone=False)
def paligemma() -> LoadedModel:
    config = tf.PaliGemmaConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, projection_dim=WIDTH),
        text_config=tf.GemmaConfig(**TEXT),
        image_token_index=FIRST_SPECIAL,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
    )
    pictures = tf.SiglipImageProcessorPil(size=SQUARE)
    pictures.image_seq_length = 4
    processor = tf.PaliGemmaProcessor(
        pictures,
        tokenizer(["<image>"], image_token="<image>"),
        chat_template=template("<image>"),
    )
    return ready(tf.PaliGemmaForConditionalGeneration(config), processor, "tiny PaliGemma")
