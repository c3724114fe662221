"""Idefics, SmolVLM, and Aria, which has their vision tower."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import ClassVar
from unittest.mock import patch

import transformers as tf

from tests.families.base import (
    FIRST_SPECIAL,
    MEAN,
    TEXT,
    VISION,
    WIDTH,
    family,
    ready,
    template,
    tokenizer,
    without_video,
)
from vlm_safeguard.model.loading import LoadedModel

processing_smolvlm = import_module("transformers.models.smolvlm.processing_smolvlm")


IDEFICS_TEMPLATE = (
    "<s>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
IDEFICS = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
IDEFICS += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]


@family(
    "Idefics2",
    markup=(("<image>",), "<fake_token_around_image>", "<fake_token_around_image>"),
    decoder="model.text_model",
)
def idefics2() -> LoadedModel:
    config = tf.Idefics2Config(
        vision_config=VISION,
        perceiver_config={
            "hidden_size": WIDTH,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "num_key_value_heads": 1,
        },
        text_config=tf.MistralConfig(**TEXT),
        image_token_id=FIRST_SPECIAL,
    )
    processor = tf.Idefics2Processor(
        tf.Idefics2ImageProcessorPil(
            size={"shortest_edge": 12, "longest_edge": 24}, do_image_splitting=False
        ),
        tokenizer(IDEFICS),
        image_seq_len=4,
        chat_template=IDEFICS_TEMPLATE,
    )
    return ready(tf.Idefics2ForConditionalGeneration(config), processor, "tiny Idefics2")


VIDEO = SimpleNamespace(num_frames=1, fps=1, size=None)


def tiled(splitting: bool = True) -> LoadedModel:
    config = tf.Idefics3Config(
        vision_config=VISION,
        text_config=tf.LlamaConfig(**TEXT),
        image_token_id=FIRST_SPECIAL,
    )
    processor = tf.Idefics3Processor(
        tf.Idefics3ImageProcessorPil(
            size={"longest_edge": 72},
            max_image_size={"longest_edge": 24},
            do_image_splitting=splitting,
        ),
        tokenizer(IDEFICS),
        image_seq_len=1,
        chat_template=IDEFICS_TEMPLATE,
    )
    return ready(tf.Idefics3ForConditionalGeneration(config), processor, "tiny Idefics3")


@family(
    "Idefics3",
    markup=(("<image>",), "<fake_token_around_image><global-img>", "<fake_token_around_image>"),
    decoder="model.text_model",
    exact=False,
)
def idefics3() -> LoadedModel:
    return tiled(splitting=False)


TILE_MARKUP = ("<image>", "<fake_token_around_image>", "<global-img>", *IDEFICS[4:])


@family(
    "Idefics3, pictures split",
    markup=(TILE_MARKUP, "", ""),
    inner="\n",
    decoder="model.text_model",
    exact=False,
)
def idefics3_split() -> LoadedModel:
    return tiled()


@family(
    "SmolVLM",
    markup=(("<image>",), "<fake_token_around_image><global-img>", "<fake_token_around_image>"),
    decoder="model.text_model",
    exact=False,
)
def smolvlm(splitting: bool = False) -> LoadedModel:
    config = tf.SmolVLMConfig(
        vision_config=VISION,
        text_config=tf.LlamaConfig(**TEXT),
        image_token_id=FIRST_SPECIAL,
    )
    with patch.object(processing_smolvlm, "num2words", str):  # it counts the frames of a video
        processor = without_video(tf.SmolVLMProcessor)(
            tf.SmolVLMImageProcessorPil(
                size={"longest_edge": 72},
                max_image_size={"longest_edge": 24},
                do_image_splitting=splitting,
            ),
            tokenizer(IDEFICS),
            VIDEO,
            image_seq_len=1,
            chat_template=IDEFICS_TEMPLATE,
        )
    return ready(tf.SmolVLMForConditionalGeneration(config), processor, "tiny SmolVLM")


@family(
    "SmolVLM, pictures split",
    markup=(TILE_MARKUP, "", ""),
    inner="\n",
    decoder="model.text_model",
    exact=False,
)
def smolvlm_split() -> LoadedModel:
    return smolvlm(splitting=True)


class _Aria(tf.AriaProcessor):
    images_kwargs: ClassVar = {}  # what they do there is said of every picture


@family("Aria", markup=(("<image>",), "", ""))
def aria() -> LoadedModel:
    side = 490  # or 980: no other is known to its processor of pictures
    experts = {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
    vision = {"model_type": "idefics3_vision", "image_size": side, "patch_size": 70}
    config = tf.AriaConfig(
        vision_config=VISION | vision,
        text_config=tf.AriaTextConfig(**TEXT, **experts),
        image_token_index=FIRST_SPECIAL,
        projector_patch_to_query_dict={49: 2},
    )
    processor = _Aria(
        tf.AriaImageProcessorPil(max_image_size=side, min_image_size=70, **MEAN),
        tokenizer(["<image>"], image_token="<image>"),
        size_conversion={side: 2},
        chat_template=template("<image>"),
    )
    return ready(tf.AriaForConditionalGeneration(config), processor, "tiny Aria")
