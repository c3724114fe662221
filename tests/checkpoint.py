"""A tiny random LLaVA as a complete checkpoint folder: weights, tokenizer, processor, template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from tests import tiny
from vlm_safeguard.model.loading import LoadedModel, load

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)

SYSTEM = "You are a helpful assistant. "
BEGIN = len(SYSTEM + "user: ")  # tokens before a user's words: the tokenizer reads bytes


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Reads text byte by byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters.remove("Ā")  # the zero byte makes room for the special tokens
    vocab = {"<pad>": tiny.PAD, "</s>": tiny.EOS, "<s>": 2, "<image>": tiny.IMAGE, "<unk>": 259}
    vocab |= {letter: 3 + place for place, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )


def save(folder: Path, seed: int = 0, **text: Any) -> Path:
    """Write the checkpoint. ``text``: as in ``tiny.llava``."""
    side = {"height": 24, "width": 24}
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            do_resize=True, size=side, do_center_crop=False, crop_size=side
        ),
        tokenizer=byte_tokenizer(),
        patch_size=12,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    model = tiny.llava(seed, max_position_embeddings=2048, **text)
    model.generation_config.eos_token_id = tiny.EOS
    model.save_pretrained(folder)
    return folder


def load_with_system(folder: Path, **text: Any) -> LoadedModel:
    """A checkpoint as by ``save``, loaded; its template begins with a system prompt."""
    loaded = load(save(folder, **text))
    loaded.processor.chat_template = SYSTEM + loaded.processor.chat_template
    return loaded
