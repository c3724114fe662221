"""What the families have in common: configurations, tokenizer, template, registry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests import tiny
from vlm_safeguard.model.loading import LoadedModel

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
