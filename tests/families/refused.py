"""Families that are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as tf

from tests.families.base import FIRST_SPECIAL, PAD, TEXT, VISION, VOCAB, WIDTH

REFUSED: dict[str, Callable[[], Any]] = {}


def refused(name: str) -> Callable[[Callable[[], Any]], Any]:
    def register(build: Callable[[], Any]) -> Callable[[], Any]:
        REFUSED[name] = build
        return build

    return register


NOT_THERE = ("head_dim", "num_key_value_heads")  # in configurations of older models
QFORMER = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "encoder_hidden_size": 16,
    "max_position_embeddings": 64,
}


def _blip(config: Any, text: Any) -> Any:
    return config(
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config=text,
        num_query_tokens=4,
        image_token_index=FIRST_SPECIAL,
    )


@refused("InstructBLIP with a decoder-only LLM")
def instructblip() -> Any:
    text = tf.LlamaConfig(**TEXT)
    return tf.InstructBlipForConditionalGeneration(_blip(tf.InstructBlipConfig, text))


@refused("InstructBLIP with T5")
def instructblip_t5() -> Any:
    text = tf.T5Config(
        vocab_size=VOCAB,
        d_model=WIDTH,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=PAD,
    )
    return tf.InstructBlipForConditionalGeneration(_blip(tf.InstructBlipConfig, text))


@refused("BLIP-2")
def blip_2() -> Any:
    text = tf.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=WIDTH,
        max_position_embeddings=64,
    )
    return tf.Blip2ForConditionalGeneration(_blip(tf.Blip2Config, text))


@refused("Kosmos-2")
def kosmos2() -> Any:
    text = {
        "vocab_size": VOCAB,
        "embed_dim": WIDTH,
        "layers": 2,
        "ffn_dim": 48,
        "attention_heads": 4,
        "max_position_embeddings": 64,
    }
    config = tf.Kosmos2Config(text_config=text, vision_config=VISION, latent_query_num=4)
    return tf.Kosmos2ForConditionalGeneration(config)


@refused("Janus")
def janus() -> Any:
    vision = {key: value for key, value in VISION.items() if key != "intermediate_size"}
    config = tf.JanusConfig(
        vision_config=vision | {"projection_dim": WIDTH, "num_image_tokens": 4},
        vq_config={
            "num_embeddings": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "latent_channels": 8,
            "num_res_blocks": 1,
            "num_patches": 2,
            "projection_dim": WIDTH,
            "image_token_embed_dim": WIDTH,
        },
        text_config=tf.LlamaConfig(**TEXT),
        image_token_id=FIRST_SPECIAL,
    )
    return tf.JanusForConditionalGeneration(config)


@refused("Florence-2")
def florence2() -> Any:
    sizes = ("layers", "ffn_dim", "attention_heads")
    text = {f"{end}_{size}": 4 for end in ("encoder", "decoder") for size in sizes}
    text |= {"model_type": "bart", "vocab_size": VOCAB, "d_model": WIDTH}
    vision = {"embed_dim": [8] * 4, "num_heads": [2] * 4, "num_groups": [2] * 4, "depths": [1] * 4}
    vision |= {"window_size": 4, "projection_dim": WIDTH}
    config = tf.Florence2Config(text_config=text, vision_config=vision)
    return tf.Florence2ForConditionalGeneration(config)


@refused("Gemma 3n")
def gemma3n() -> Any:
    """With the vision tower of SigLIP: its own needs another package."""
    text = {key: value for key, value in TEXT.items() if key != "num_hidden_layers"}
    config = tf.Gemma3nConfig(
        text_config=tf.Gemma3nTextConfig(
            **text,
            num_hidden_layers=2,
            vocab_size_per_layer_input=VOCAB,
            hidden_size_per_layer_input=8,
            num_kv_shared_layers=0,
            laurel_rank=4,
            layer_types=["sliding_attention", "full_attention"],
            activation_sparsity_pattern=[0.0] * 2,
            sliding_window=16,
        ),
        audio_config={
            "hidden_size": 16,
            "conf_num_hidden_layers": 1,
            "conf_num_attention_heads": 2,
            "sscp_conv_channel_size": [4, 4],
            "vocab_size": 4,
            "vocab_offset": VOCAB - 4,
        },
        image_token_id=FIRST_SPECIAL,
        audio_token_id=FIRST_SPECIAL + 1,
    )
    vision = VISION | {"vocab_size": 4, "vocab_offset": VOCAB - 8, "rms_norm_eps": 1e-6}
    vars(config)["vision_config"] = tf.SiglipVisionConfig(**vision)  # past the check of its class
    return tf.Gemma3nForConditionalGeneration(config)


@refused("GIT")
def git() -> Any:
    text = {key: value for key, value in TEXT.items() if key not in NOT_THERE}
    return tf.GitForCausalLM(tf.GitConfig(**text, vision_config=VISION))


@refused("Idefics")
def idefics() -> Any:
    text = {key: value for key, value in TEXT.items() if key not in NOT_THERE}
    vision = {key: value for key, value in VISION.items() if key != "hidden_size"}
    config = tf.IdeficsConfig(
        **text, vision_config=vision | {"embed_dim": 16}, cross_layer_interval=2
    )
    return tf.IdeficsForVisionText2Text(config)
