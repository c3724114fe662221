"""MiniCPM-V: slices, each in its own wrapper. Without the numbers that its processor writes before
pictures by default."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import transformers as tf

from tests.families.base import (
    FIRST_SPECIAL,
    TEXT,
    VISION,
    family,
    ready,
    template,
    tokenizer,
    without_video,
)
from tests.families.qwen_family import LINEAR, mrope
from vlm_safeguard.model.loading import LoadedModel

NAMED = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}
IDS = {"image_token_id": FIRST_SPECIAL, "video_token_id": FIRST_SPECIAL + 1}
SLICES = ("image_start", "image_end", "slice_start", "slice_end")
UNWRITTEN = ("video_token", "image_id_start_token", "image_id_end_token")
MARKUP = tuple(token for name, token in NAMED.items() if name not in UNWRITTEN)
VIDEO = SimpleNamespace(slice_mode=False, downsample_mode="16x", model_input_names=[])


def _minicpm(config: type, model: type, processor: type, name: str, **more: Any) -> LoadedModel:
    settings = config(
        text_config=tf.Qwen3_5TextConfig(**TEXT | mrope(2, 1, 1) | LINEAR),
        vision_config=VISION | {"patch_size": 6},
        insert_layer_id=0,
        **IDS,
        **more,
    )
    pictures = tf.MiniCPMV4_6ImageProcessorPil(
        patch_size=6, scale_resolution=24, max_slice_nums=4, use_image_id=False
    )
    made = without_video(processor)(
        pictures, VIDEO, tokenizer(list(NAMED.values()), **NAMED), template("<|image_pad|>")
    )
    return ready(model(settings), made, name)


@family("MiniCPM-V 4.6", markup=(MARKUP, "", ""), inner="\n")
def minicpmv4_6() -> LoadedModel:
    return _minicpm(
        tf.MiniCPMV4_6Config,
        tf.MiniCPMV4_6ForConditionalGeneration,
        tf.MiniCPMV4_6Processor,
        "tiny MiniCPM-V 4.6",
    )


@family("MiniCPM-V 4.7", markup=(MARKUP, "", ""), inner="\n")
def minicpmv4_7() -> LoadedModel:
    places = list(NAMED).index
    marks = {f"{mark}_id": FIRST_SPECIAL + places(f"{mark}_token") for mark in SLICES}
    newline = tokenizer().encode("\n", add_special_tokens=False)[0]
    return _minicpm(
        tf.MiniCPMV4_7Config,
        tf.MiniCPMV4_7ForConditionalGeneration,
        tf.MiniCPMV4_7Processor,
        "tiny MiniCPM-V 4.7",
        **marks,
        newline_id=newline,
    )
