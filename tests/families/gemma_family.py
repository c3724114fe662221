"""Gemma 3, Gemma 4 and PaliGemma: attention masks of their own."""

from __future__ import annotations

import transformers as tf

from tests.families.base import (
    FIRST_SPECIAL,
    SQUARE,
    TEXT,
    VISION,
    VOCAB,
    WIDTH,
    family,
    ready,
    template,
    tokenizer,
    without_video,
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


GEMMA_4 = ["<|image|>", "<|image>", "<image|>", "<|audio|>", "<|audio>", "<audio|>", "<|video|>"]


@family("Gemma 4", markup=(("<|image|>",), "\n\n<|image>", "<image|>\n\n"))
def gemma4() -> LoadedModel:
    """Its last two layers share the keys and values of those below."""
    text = TEXT | {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8}
    config = tf.Gemma4Config(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "patch_size": 8,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
        },
        text_config=text
        | {
            "global_head_dim": 8,
            "vocab_size_per_layer_input": VOCAB,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        audio_config=None,
        image_token_id=FIRST_SPECIAL,
        boi_token_id=FIRST_SPECIAL + 1,
        eoi_token_id=FIRST_SPECIAL + 2,
        audio_token_id=FIRST_SPECIAL + 3,
        boa_token_id=FIRST_SPECIAL + 4,
        eoa_token_index=FIRST_SPECIAL + 5,
        video_token_id=FIRST_SPECIAL + 6,
    )
    names = ("image_token", "boi_token", "eoi_token", "audio_token", "boa_token", "eoa_token")
    processor = without_video(tf.Gemma4Processor)(
        tf.Gemma4AudioFeatureExtractor(),
        tf.Gemma4ImageProcessorPil(patch_size=8, pooling_kernel_size=2, max_soft_tokens=70),
        tokenizer(GEMMA_4, **dict(zip(names, GEMMA_4, strict=False))),
        None,
        chat_template=template("\n\n<|image|>\n\n"),
    )
    return ready(tf.Gemma4ForConditionalGeneration(config), processor, "tiny Gemma 4")


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
