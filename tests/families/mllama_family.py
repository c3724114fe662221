"""Llama 3.2 Vision: cross-attention."""

from __future__ import annotations

import torch
import transformers as tf

from tests.families.base import FIRST_SPECIAL, SQUARE, TEXT, family, ready, template, tokenizer
from vlm_safeguard.model.loading import LoadedModel

ASPECTS = [[rows, columns] for rows in range(1, 5) for columns in range(1, 5) if rows * columns < 5]


@family("Mllama (Llama 3.2 Vision)", markup=(("<|image|>",), "", ""), mixed=False)
def mllama() -> LoadedModel:
    text = {key: value for key, value in TEXT.items() if key != "head_dim"}
    config = tf.MllamaConfig(
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "intermediate_size": 24,
            "vision_output_dim": 32,
            "image_size": 24,
            "patch_size": 12,
            "max_num_tiles": 4,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [
                [r, c] for r in range(1, 5) for c in range(1, 5) if r * c < 5
            ],
        },
        text_config=text | {"cross_attention_layers": [1]},
        image_token_index=FIRST_SPECIAL,
    )
    processor = tf.MllamaProcessor(
        tf.MllamaImageProcessorPil(size=SQUARE, max_image_tiles=4),
        tokenizer(["<|image|>", "<|python_tag|>"]),
        chat_template="<s>" + template("<|image|>"),
    )
    made = ready(tf.MllamaForConditionalGeneration(config), processor, "tiny Mllama")
    for name, parameter in made.model.named_parameters():
        if "gate" in name and parameter.numel() == 1:
            torch.nn.init.constant_(parameter, 0.5)  # they start closed
    return made
