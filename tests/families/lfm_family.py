"""LFM2-VL: convolutions between the layers with attention."""

from __future__ import annotations

from typing import Any, ClassVar

import transformers as tf

from tests.families.base import FIRST_SPECIAL, TEXT, VISION, family, ready, template, tokenizer
from vlm_safeguard.model.loading import LoadedModel


class _Pictures(tf.Siglip2ImageProcessorPil):
    """In place of the family's own, which needs torchvision: a picture is one tile."""

    use_thumbnail = False
    encoder_patch_size = patch_size = 6
    downsample_factor = 2
    tile_size = 24

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        found = super().preprocess(images, *args, **kwargs)
        count = len(found["pixel_values"])
        found["image_rows"] = found["image_cols"] = [1] * count
        found["image_sizes"] = [(6 * h, 6 * w) for h, w in found["spatial_shapes"].tolist()]
        return found


class _Processor(tf.Lfm2VlProcessor):
    images_kwargs: ClassVar = {}  # what they do there is said of every picture


@family("LFM2-VL", markup=(("<image>",), "<|image_start|>", "<|image_end|>"))
def lfm2_vl() -> LoadedModel:
    text = TEXT | {"layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 8}
    config = tf.Lfm2VlConfig(
        vision_config=tf.Siglip2VisionConfig(
            **{k: v for k, v in VISION.items() if k != "image_size"} | {"patch_size": 6},
            num_patches=16,
        ),
        text_config=tf.Lfm2Config(**text),
        image_token_id=FIRST_SPECIAL,
        projector_hidden_size=24,
    )
    specials = ["<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"]
    processor = _Processor(
        _Pictures(patch_size=6, max_num_patches=16),
        tokenizer(specials),
        chat_template=template("<image>"),
    )
    return ready(tf.Lfm2VlForConditionalGeneration(config), processor, "tiny LFM2-VL")
