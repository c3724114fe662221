"""Tiny random models of many VLM families, each with its real processor and a chat template.

One function per family builds what ``vlm_safeguard.load`` would give for a checkpoint of it: the
model from its configuration classes, the processor from its own classes with the
processors for pictures that need no torchvision, and a tokenizer that reads byte by byte. The
templates write a picture and its wrapper as the published templates do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import transformers as tf
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests import tiny
from vlm_safeguard.model.loading import LoadedModel

# Modules that ask for torchvision or num2words, of which pictures need neither.
_PIXTRAL = "transformers.models.pixtral"
_pillow = import_module(f"{_PIXTRAL}.image_processing_pil_pixtral")
with patch.dict(sys.modules, {f"{_PIXTRAL}.image_processing_pixtral": _pillow}):
    processing_pixtral = import_module(f"{_PIXTRAL}.processing_pixtral")
processing_smolvlm = import_module("transformers.models.smolvlm.processing_smolvlm")


LAYERS, WIDTH = 4, 32
PAD, EOS, BOS, FIRST_SPECIAL = 0, 1, 2, 260
VOCAB = 340

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 12,
}
SQUARE = {"height": 24, "width": 24}
MEAN = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@dataclass(frozen=True)
class Family:
    """One row of the matrix, with what is to be found written down by hand.

    ``decoder`` is where the language decoder lies. ``markup`` has the tokens that go with a
    picture: its own, those before it and those after it; ``inner`` is text that stands between its
    own. ``exact``: whether the template words
    text alone as it does beside a picture, white space included. ``mixed``: whether the family
    itself gives the rows of a batch with and without pictures what it gives each alone.
    ``both_ways``: whether tokens of a prompt attend to those after them. ``text_alone``: whether
    its processor takes requests without a picture.
    """

    name: str
    build: Callable[[], LoadedModel]
    markup: tuple[tuple[str, ...], str, str]
    decoder: str = "model.language_model"
    inner: str = ""
    exact: bool = True
    mixed: bool = True
    both_ways: bool = False
    text_alone: bool = True


FAMILIES: dict[str, Family] = {}


def family(name: str, **facts: Any) -> Callable[[Callable[[], LoadedModel]], Any]:
    def register(build: Callable[[], LoadedModel]) -> Callable[[], LoadedModel]:
        FAMILIES[build.__name__] = Family(name, build, **facts)
        return build

    return register


# -- parts -------------------------------------------------------------------------------------


def tokenizer(specials: Sequence[str] = (), newlines: bool = False, **named: str) -> Any:
    """Reads byte by byte; ``specials`` follow from ``FIRST_SPECIAL`` on, in order. With
    ``newlines`` two of them melt into one token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters.remove("Ā")  # the zero byte makes room for the special tokens
    vocab = {"<pad>": PAD, "</s>": EOS, "<s>": BOS, "<unk>": FIRST_SPECIAL - 1}
    vocab |= {letter: 3 + place for place, letter in enumerate(letters)}
    vocab |= {token: FIRST_SPECIAL + place for place, token in enumerate(specials)}
    merges = [("Ċ", "Ċ")] if newlines else []
    vocab |= {"ĊĊ": VOCAB - 1} if newlines else {}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True) for token in specials])
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=named,
    )


def template(picture: str) -> str:
    """A chat template that writes ``picture`` where a picture stands."""
    return (
        "{% for message in messages %}{{ message['role'] }}: "
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        + picture.replace("\n", "{{ '\\n' }}")
        + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )


def without_video(processor: type) -> type:
    """The processor's class with anything for its processor of videos, which needs torchvision."""

    def check(self: Any, name: str, argument: Any) -> Any:
        if name == "video_processor":
            return None
        return super(made, self).check_argument_for_proper_class(name, argument)

    made = type(processor.__name__, (processor,), {"check_argument_for_proper_class": check})
    return made


def ready(model: Any, processor: Any, name: str, seed: int = 0) -> LoadedModel:
    """As ``tiny.ready`` has it; no special token is ever generated."""
    torch.manual_seed(seed)
    tiny.ready(model)
    model.generation_config.suppress_tokens = list(range(FIRST_SPECIAL, VOCAB))
    return LoadedModel(model, processor, name)


def photo(seed: int, width: int = 40, height: int = 32) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


# -- LLaVA and its kin -------------------------------------------------------------------------


def _clip() -> Any:
    return tf.CLIPImageProcessorPil(do_resize=True, size=SQUARE, do_center_crop=False)


@family("LLaVA", markup=(("<image>",), "", "\n"))
def llava() -> LoadedModel:
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_id=FIRST_SPECIAL,
    )
    processor = tf.LlavaProcessor(
        _clip(),
        tokenizer(["<image>"]),
        patch_size=12,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>\n"),
    )
    return ready(tf.LlavaForConditionalGeneration(config), processor, "tiny LLaVA")


@family("VipLLaVA", markup=(("<image>",), "", "\n"))
def vipllava() -> LoadedModel:
    config = tf.VipLlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_id=FIRST_SPECIAL,
        vision_feature_layers=[-2, -1],
    )
    processor = tf.LlavaProcessor(
        _clip(),
        tokenizer(["<image>"]),
        patch_size=12,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>\n"),
    )
    return ready(tf.VipLlavaForConditionalGeneration(config), processor, "tiny VipLLaVA")


GRID = [[24, 24], [24, 48], [48, 24]]


@family("LLaVA-NeXT", markup=(("<image>",), "", "\n"))
def llava_next() -> LoadedModel:
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=tf.MistralConfig(**TEXT),
        image_token_id=FIRST_SPECIAL,
        image_grid_pinpoints=GRID,
    )
    processor = tf.LlavaNextProcessor(
        tf.LlavaNextImageProcessorPil(
            size={"shortest_edge": 24}, crop_size=SQUARE, image_grid_pinpoints=GRID
        ),
        tokenizer(["<image>"]),
        patch_size=12,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>\n"),
    )
    return ready(tf.LlavaNextForConditionalGeneration(config), processor, "tiny LLaVA-NeXT")


@family("LLaVA-OneVision", markup=(("<image>",), "", "\n"))
def llava_onevision() -> LoadedModel:
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**VISION),
        text_config=tf.Qwen2Config(**TEXT),
        image_token_id=FIRST_SPECIAL,
        video_token_id=FIRST_SPECIAL + 1,
        image_grid_pinpoints=GRID,
    )
    processor = without_video(tf.LlavaOnevisionProcessor)(
        tf.LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=GRID),
        tokenizer(["<image>", "<video>"]),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=template("<image>\n"),
    )
    return ready(
        tf.LlavaOnevisionForConditionalGeneration(config), processor, "tiny LLaVA-OneVision"
    )


# -- Qwen-VL: positions in three dimensions ----------------------------------------------------

QWEN = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
QWEN_IDS = {
    "vision_start_token_id": FIRST_SPECIAL,
    "vision_end_token_id": FIRST_SPECIAL + 1,
    "image_token_id": FIRST_SPECIAL + 2,
    "video_token_id": FIRST_SPECIAL + 3,
}
QWEN_MARKUP = (("<|image_pad|>",), "<|vision_start|>", "<|vision_end|>")
QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


def _mrope(*section: int, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section)}
    return {"rope_parameters": rope | more}


def _qwen_pictures() -> Any:
    return tf.Qwen2VLImageProcessorPil(
        patch_size=8, size={"shortest_edge": 256, "longest_edge": 4096}, merge_size=2
    )


@family("Qwen2-VL", markup=QWEN_MARKUP)
def qwen2_vl() -> LoadedModel:
    config = tf.Qwen2VLConfig(
        text_config=TEXT | _mrope(1, 1, 2),
        vision_config={
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": WIDTH,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 8,
        },
        **QWEN_IDS,
    )
    processor = without_video(tf.Qwen2VLProcessor)(
        _qwen_pictures(), tokenizer(QWEN), chat_template=template(QWEN_PICTURE)
    )
    return ready(tf.Qwen2VLForConditionalGeneration(config), processor, "tiny Qwen2-VL")


@family("Qwen2.5-VL", markup=QWEN_MARKUP)
def qwen2_5_vl() -> LoadedModel:
    config = tf.Qwen2_5_VLConfig(
        text_config=TEXT | _mrope(1, 1, 2),
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": WIDTH,
            "num_heads": 2,
            "patch_size": 8,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        **QWEN_IDS,
    )
    processor = without_video(tf.Qwen2_5_VLProcessor)(
        _qwen_pictures(), tokenizer(QWEN), chat_template=template(QWEN_PICTURE)
    )
    return ready(tf.Qwen2_5_VLForConditionalGeneration(config), processor, "tiny Qwen2.5-VL")


@family("Qwen3-VL", markup=QWEN_MARKUP)
def qwen3_vl() -> LoadedModel:
    config = tf.Qwen3VLConfig(
        text_config=TEXT | _mrope(2, 1, 1),
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": WIDTH,
            "num_heads": 2,
            "patch_size": 8,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        **QWEN_IDS,
    )
    processor = without_video(tf.Qwen3VLProcessor)(
        _qwen_pictures(), tokenizer(QWEN), chat_template=template(QWEN_PICTURE)
    )
    return ready(tf.Qwen3VLForConditionalGeneration(config), processor, "tiny Qwen3-VL")


@family("Qwen3-VL-MoE", markup=QWEN_MARKUP)
def qwen3_vl_moe() -> LoadedModel:
    experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    config = tf.Qwen3VLMoeConfig(
        text_config=TEXT | _mrope(2, 1, 1) | experts,
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": WIDTH,
            "num_heads": 2,
            "patch_size": 8,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        **QWEN_IDS,
    )
    processor = without_video(tf.Qwen3VLProcessor)(
        _qwen_pictures(), tokenizer(QWEN), chat_template=template(QWEN_PICTURE)
    )
    return ready(tf.Qwen3VLMoeForConditionalGeneration(config), processor, "tiny Qwen3-VL-MoE")


@family("Qwen3.5", markup=QWEN_MARKUP)
def qwen3_5() -> LoadedModel:
    linear = {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_conv_kernel_dim": 4,
    }
    config = tf.Qwen3_5Config(
        text_config=TEXT | _mrope(2, 1, 1) | linear,
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": WIDTH,
            "num_heads": 2,
            "patch_size": 8,
            "num_position_embeddings": 16,
        },
        **QWEN_IDS,
    )
    processor = without_video(tf.Qwen3VLProcessor)(
        _qwen_pictures(), tokenizer(QWEN), chat_template=template(QWEN_PICTURE)
    )
    return ready(tf.Qwen3_5ForConditionalGeneration(config), processor, "tiny Qwen3.5")


# -- tiles with a wrapper ----------------------------------------------------------------------


def _tiles(**more: Any) -> Any:
    return tf.GotOcr2ImageProcessorPil(
        size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4, **MEAN, **more
    )


@family("InternVL", markup=(("<IMG_CONTEXT>",), "<img>", "</img>\n"))
def internvl() -> LoadedModel:
    specials = ["<IMG_CONTEXT>", "<img>", "</img>", "<video>"]
    config = tf.InternVLConfig(
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "image_size": [24, 24],
            "patch_size": [6, 6],
        },
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


# -- masks of their own ------------------------------------------------------------------------


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


# -- Idefics -----------------------------------------------------------------------------------

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


# -- cross-attention ---------------------------------------------------------------------------


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


# -- Pixtral's vision tower --------------------------------------------------------------------

PIXTRAL = ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]


def _pixtral(**more: Any) -> Any:
    return processing_pixtral.PixtralProcessor(
        tf.PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size=8),
        tokenizer(PIXTRAL),
        patch_size=8,
        chat_template=template("[IMG]"),
        **more,
    )


def _pixtral_tower() -> Any:
    return tf.PixtralVisionConfig(**VISION | {"patch_size": 8, "image_size": 64})


@family("Pixtral", markup=(("[IMG]", "[IMG_BREAK]"), "", "[IMG_END]"))
def pixtral() -> LoadedModel:
    config = tf.LlavaConfig(
        vision_config=_pixtral_tower(),
        text_config=tf.MistralConfig(**TEXT),
        image_token_id=FIRST_SPECIAL,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return ready(tf.LlavaForConditionalGeneration(config), _pixtral(), "tiny Pixtral")


@family("Mistral 3", markup=(("[IMG]", "[IMG_BREAK]"), "", "[IMG_END]"))
def mistral3() -> LoadedModel:
    config = tf.Mistral3Config(
        vision_config=_pixtral_tower(),
        text_config=tf.MistralConfig(**TEXT),
        image_token_index=FIRST_SPECIAL,
        spatial_merge_size=2,
    )
    processor = _pixtral(spatial_merge_size=2)
    return ready(tf.Mistral3ForConditionalGeneration(config), processor, "tiny Mistral 3")


@family("GLM-4V", markup=(("<|image|>",), "<|begin_of_image|>", "<|end_of_image|>"))
def glm4v() -> LoadedModel:
    specials = ["<|image|>", "<|begin_of_image|>", "<|end_of_image|>", "<|video|>"]
    specials += ["<|begin_of_video|>", "<|end_of_video|>"]
    text = {key: value for key, value in TEXT.items() if key != "head_dim"}
    config = tf.Glm4vConfig(
        text_config=text | _mrope(1, 1, 2, partial_rotary_factor=1.0),
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


# -- what is refused ---------------------------------------------------------------------------

REFUSED: dict[str, Callable[[], Any]] = {}


def refused(name: str) -> Callable[[Callable[[], Any]], Any]:
    def register(build: Callable[[], Any]) -> Callable[[], Any]:
        REFUSED[name] = build
        return build

    return register


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
    """Its language model alone: the vision tower needs another package."""
    text = {key: value for key, value in TEXT.items() if key != "num_hidden_layers"}
    config = tf.Gemma3nTextConfig(
        **text,
        num_hidden_layers=2,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
        laurel_rank=4,
        layer_types=["sliding_attention", "full_attention"],
        activation_sparsity_pattern=[0.0] * 2,
        sliding_window=16,
    )
    return tf.Gemma3nForCausalLM(config)
