"""The reasoning that some models write before their answer, and the answer without it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from vlm_safeguard.model.chat_template import find_template

# What reasoning begins and ends with, in the models that transformers knows.
TAGS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<seed:think>": "</seed:think>",
    "<|channel>thought": "<channel|>",
    "◁think▷": "◁/think▷",
    "[THINK]": "[/THINK]",
}


def answer_of(response: str) -> str:
    """A response without the reasoning that it begins with; "" if the reasoning does not end.

    Only a response that begins with one of ``TAGS`` has reasoning. It ends at the first end tag.
    """
    text = response.lstrip()
    for begin, end in TAGS.items():
        if text.startswith(begin):
            return text.partition(end)[2].strip()
    return response


def may_reason(processor: Any) -> bool:
    """Whether the tokenizer or the chat template of a processor knows a tag that ends reasoning."""
    known = {token.content for token in processor.tokenizer.added_tokens_decoder.values()}
    template = find_template(processor) or ""
    return any(end in known or end in template for end in TAGS.values())


def opened_by(tokenizer: Any, prompt: Sequence[int]) -> str:
    """The tag with which a chat template begins the answer, the end of its ``prompt``; or ""."""
    tail = str(tokenizer.decode(list(prompt[-16:]))).rstrip()
    return next((begin for begin in TAGS if tail.endswith(begin)), "")


def decoded(tokenizer: Any, ids: Sequence[int], opened: str = "") -> str:
    """Generated tokens as text, without special tokens but for ``TAGS``.

    ``opened``: the tag that the prompt ended with; the text then begins with it.
    """
    kept = {
        token: added.content
        for token, added in tokenizer.added_tokens_decoder.items()
        if added.special and any(added.content in tag for pair in TAGS.items() for tag in pair)
    }
    text = opened
    for is_kept, group in groupby(ids, kept.__contains__):
        part = list(group)
        if is_kept:
            text += "".join(kept[token] for token in part)
        else:
            text += str(tokenizer.decode(part, skip_special_tokens=True))
    return text.strip()


class AnswerLimit(StoppingCriteria):
    """Ends a row ``tokens`` tokens after its reasoning, or after its prompt if it does not reason.

    ``lengths`` has how many tokens of each row count, once it has ended.
    """

    def __init__(self, tokenizer: Any, width: int, tokens: int, opened: str) -> None:
        self._tokenizer, self._width, self._tokens = tokenizer, width, tokens
        self._opened = opened
        self._begun: dict[int, int] = {}  # by row: where its answer begins
        self.lengths: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        """Which rows of ids (B, T) have ended, (B,)."""
        for row, ids in enumerate(input_ids[:, self._width :].tolist()):
            begun = None if row in self.lengths else self._answer_begins(row, ids)
            if begun is not None and len(ids) - begun >= self._tokens:
                self.lengths[row] = len(ids)
        ended = [row in self.lengths for row in range(len(input_ids))]
        return torch.tensor(ended, device=input_ids.device)

    def _answer_begins(self, row: int, ids: list[int]) -> int | None:
        """Place of the answer's first token; None while the row reasons."""
        if row not in self._begun:
            text = decoded(self._tokenizer, ids, self._opened)
            tag = next((begin for begin in TAGS if text.startswith(begin)), None)
            if tag is None:  # or a part of one
                return 0
            if TAGS[tag] not in text:
                return None
            self._begun[row] = len(ids)
        return self._begun[row]
