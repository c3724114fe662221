"""Kimi K2.5: latent attention, and experts from the second layer on."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

from tests.families.base import (
    FIRST_SPECIAL,
    TEXT,
    family,
    ready,
    template,
    tokenizer,
    without_video,
)
from vlm_safeguard.model.loading import LoadedModel

KIMI = ["<|media_pad|>", "<|kimi_k25_video_placeholder|>"]
KIMI += ["<|media_begin|>", "<|media_content|>", "<|media_end|>"]
BEFORE, AFTER = "<|media_begin|>image<|media_content|>", "<|media_end|>\n"


class _Pictures(tf.MiniCPMV4_6ImageProcessorPil):
    """In place of the family's own, which needs torchvision: whole pictures as patches."""

    merge_size = 2

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        found = super().preprocess(images, *args, **kwargs)
        sizes = torch.as_tensor(found["target_sizes"]).long()
        side, pixels = self.patch_size, torch.as_tensor(found["pixel_values"])[0]
        pixels = pixels.reshape(len(pixels), side, -1, side).permute(2, 0, 1, 3)
        grid = torch.cat([torch.ones(len(sizes), 1, dtype=torch.long), sizes], dim=1)
        return tf.BatchFeature({"pixel_values": pixels.contiguous(), "image_grid_thw": grid})

    @property
    def model_input_names(self) -> list[str]:
        return ["pixel_values", "image_grid_thw"]


@family("Kimi K2.5", markup=(("<|media_pad|>",), BEFORE, AFTER))
def kimi_k25() -> LoadedModel:
    text = {key: value for key, value in TEXT.items() if key != "head_dim"}
    text |= {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_mtp_layers": 0,
    }
    config = tf.Kimi_K25Config(
        text_config=tf.DeepseekV3Config(**text),
        vision_config={
            "patch_size": 6,
            "pos_emb_height": 4,
            "pos_emb_width": 4,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
        },
        projection_hidden_size=16,
        image_token_id=FIRST_SPECIAL,
        video_token_id=FIRST_SPECIAL + 1,
        vision_start_token_id=FIRST_SPECIAL + 2,
        vision_end_token_id=FIRST_SPECIAL + 4,
        tie_word_embeddings=False,
    )
    processor = without_video(tf.Kimi_K25Processor)(
        _Pictures(patch_size=6, scale_resolution=36, slice_mode=False, downsample_mode="4x"),
        tokenizer(KIMI),
        chat_template=template(BEFORE + "<|media_pad|>" + AFTER),
    )
    return ready(tf.Kimi_K25ForConditionalGeneration(config), processor, "tiny Kimi K2.5")
