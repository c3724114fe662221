"""Tiny random models of many VLM families, each with its real processor and a chat template.

One function per family builds what ``vlm_safeguard.models.load`` would give for a checkpoint of
it: the model from its configuration classes, the processor from its own classes with the
processors for pictures that need no torchvision, and a tokenizer that reads byte by byte. The
templates write a picture and its wrapper as the published templates do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from vlm_safeguard.models import LoadedModel

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
    picture: its own, those before it and those after it. ``exact``: whether the template words
    text alone as it does beside a picture, white space included. ``mixed``: whether the family
    itself gives the rows of a batch with and without pictures what it gives each alone.
    ``both_ways``: whether tokens of a prompt attend to those after them.
    """

    name: str
    build: Callable[[], LoadedModel]
    markup: tuple[str, str, str]
    decoder: str = "model.language_model"
    exact: bool = True
    mixed: bool = True
    both_ways: bool = False


FAMILIES: dict[str, Family] = {}


def family(name: str, **facts: Any) -> Callable[[Callable[[], LoadedModel]], Any]:
    def register(build: Callable[[], LoadedModel]) -> Callable[[], LoadedModel]:
        FAMILIES[build.__name__] = Family(name, build, **facts)
        return build

    return register


# -- parts -------------------------------------------------------------------------------------


def tokenizer(specials: Sequence[str] = (), **named: str) -> Any:
    """Reads byte by byte; ``specials`` follow from ``FIRST_SPECIAL`` on, in order."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters.remove("Ā")  # the zero byte makes room for the special tokens
    vocab = {"<pad>": PAD, "</s>": EOS, "<s>": BOS, "<unk>": FIRST_SPECIAL - 1}
    vocab |= {letter: 3 + place for place, letter in enumerate(letters)}
    vocab |= {token: FIRST_SPECIAL + place for place, token in enumerate(specials)}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
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
    """The processor's class where its processor for videos, which needs torchvision, is None."""

    def check(self: Any, name: str, argument: Any) -> Any:
        if name == "video_processor" and argument is None:
            return None
        return super(made, self).check_argument_for_proper_class(name, argument)

    made = type(processor.__name__, (processor,), {"check_argument_for_proper_class": check})
    return made


def ready(model: Any, processor: Any, name: str, seed: int = 0) -> LoadedModel:
    """Weights large enough that every part matters; generation never stops early."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    model.generation_config.suppress_tokens = list(range(FIRST_SPECIAL, VOCAB))
    return LoadedModel(model.eval(), processor, name)


def photo(seed: int, width: int = 40, height: int = 32) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


# -- LLaVA and its kin -------------------------------------------------------------------------


def _clip() -> Any:
    return tf.CLIPImageProcessorPil(do_resize=True, size=SQUARE, do_center_crop=False)


@family("LLaVA", markup=("<image>", "", "\n"))
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


@family("VipLLaVA", markup=("<image>", "", "\n"))
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


@family("LLaVA-NeXT", markup=("<image>", "", "\n"))
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


@family("LLaVA-OneVision", markup=("<image>", "", "\n"))
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
QWEN_MARKUP = ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>")
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
