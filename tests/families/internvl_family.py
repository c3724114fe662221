"""InternVL, Aya Vision, Cohere2-Vision and Llama 4: tiles with a wrapper."""

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


VIT = VISION | {"image_size": [24, 24], "patch_size": [6, 6]}


@family("InternVL", markup=(("<IMG_CONTEXT>",), "<img>", "</img>\n"))
def internvl() -> LoadedModel:
    specials = ["<IMG_CONTEXT>", "<img>", "</img>", "<video>"]
    config = tf.InternVLConfig(
        vision_config=VIT,
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


@family("Qianfan-OCR", markup=(("<IMG_CONTEXT>",), "<img>", "</img>\n"))
def qianfan_ocr() -> LoadedModel:
    config = tf.QianfanOCRConfig(
        vision_config=VIT,
        text_config=tf.Qwen3Config(**TEXT),
        image_token_id=FIRST_SPECIAL,
        image_seq_length=4,
    )
    named = {
        "context_image_token": "<IMG_CONTEXT>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
    }
    processor = tf.QianfanOCRProcessor(
        _tiles(),
        tokenizer([*named.values(), "<image>"], **named),
        image_seq_length=4,
        chat_template=template("<image>\n"),
    )
    return ready(tf.QianfanOCRForConditionalGeneration(config), processor, "tiny Qianfan-OCR")


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


COHERE = ("<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>")


class _CohereTiles(tf.GotOcr2ImageProcessorPil):
    """In place of the family's own, which needs torchvision: the same tiles."""

    patch_size = 2  # tokens to a side of a tile


@family("Cohere2-Vision", markup=((*COHERE, "<|START_OF_IMG|>", "<|END_OF_IMG|>"), "", ""))
def cohere2_vision() -> LoadedModel:
    config = tf.Cohere2VisionConfig(
        vision_config=tf.SiglipVisionConfig(**VISION | {"patch_size": 6}),
        text_config=tf.Cohere2Config(**TEXT, sliding_window=16),
        image_token_id=FIRST_SPECIAL,
        alignment_intermediate_size=24,
    )
    named = {
        "image_token": COHERE[0],
        "img_line_break_token": COHERE[1],
        "boi_token": "<|START_OF_IMG|>",
        "eoi_token": "<|END_OF_IMG|>",
    }
    processor = tf.Cohere2VisionProcessor(
        _CohereTiles(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4, **MEAN),
        tokenizer(list(named.values()), **named),
        chat_template=template(COHERE[0]),
    )
    model = tf.Cohere2VisionForConditionalGeneration(config)
    return ready(model, processor, "tiny Cohere2-Vision")


LLAMA_4 = ["<|patch|>", "<|image_start|>", "<|image_end|>", "<|image|>"]
LLAMA_4 += ["<|tile_x_separator|>", "<|tile_y_separator|>"]


class _OneTile(tf.GotOcr2ImageProcessorPil):
    """In place of the family's own, which needs torchvision: each picture is one tile."""

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        found = super().preprocess(images, *args, **kwargs)
        del found["num_patches"]
        found["aspect_ratios"] = [(1, 1)] * len(found["pixel_values"])
        return found


@family(
    "Llama 4",
    markup=(("<|patch|>",), "<|image_start|><|image|>", "<|image_end|>"),
    decoder="language_model.model",
)
def llama4() -> LoadedModel:
    vision = VISION | {"vision_output_dim": 16, "projector_input_dim": 16, "image_size": 24}
    vision |= {"projector_output_dim": 16, "patch_size": 6, "intermediate_size": 64}
    text = TEXT | {
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 64,
        "no_rope_layer_interval": 2,
    }
    config = tf.Llama4Config(
        vision_config=vision, text_config=text, image_token_index=FIRST_SPECIAL
    )
    processor = tf.Llama4Processor(
        _OneTile(size=SQUARE, crop_to_patches=False, **MEAN),
        tokenizer(LLAMA_4),
        patch_size=6,
        chat_template=template("<|image|>"),
    )
    return ready(tf.Llama4ForConditionalGeneration(config), processor, "tiny Llama 4")
