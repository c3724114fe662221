"""A tiny guard model that judges, with its tokenizer and chat template."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests import tiny
from vlm_safeguard.evaluation.judges import (
    parse,
)
from vlm_safeguard.evaluation.judges.guard_models import (
    ChatTemplate,
    GuardModelJudge,
    GuardParts,
)

TEMPLATE = (
    "{{ bos_token }}[INST] Assess.\n<BEGIN CONVERSATION>\n"
    "{% for m in messages %}{{ 'User' if m.role == 'user' else 'Agent' }}: {{ CONTENT }}\n\n"
    "{% endfor %}<END CONVERSATION>\n{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
AS_TEXT = TEMPLATE.replace("CONTENT", "m.content | trim")


# Given a string this one says nothing at all: it walks over characters and finds no part.
AS_PARTS = TEMPLATE.replace(
    "{{ CONTENT }}",
    "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}",
)
SPECIAL = ["</s>", "<s>", "<|assistant|>", "<|eot_id|>", "<think>", "</think>", "~~stop~~"]


def tokenizer(template: str | None = AS_TEXT) -> PreTrainedTokenizerFast:
    """Bytes as tokens, and a few control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: n for n, c in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|assistant|>", "<|eot_id|>"],
    )
    found.add_tokens(["<think>", "</think>", "~~stop~~"])  # added, but not special: as in Qwen3
    found.chat_template = template
    return found


def tiny_llama(size: int, context: int = 2048) -> LlamaForCausalLM:
    return tiny.llama(
        vocab_size=size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def guard_judge(
    read: parse.Parser = parse.llama_guard,
    template: str = AS_TEXT,
    context: int = 2048,
    **options: Any,
) -> GuardModelJudge:
    words = tokenizer(template)
    parts = GuardParts(tiny_llama(len(words), context), words, "tiny")
    return GuardModelJudge(parts, ChatTemplate(words, "tiny"), read, "harm", **options)
