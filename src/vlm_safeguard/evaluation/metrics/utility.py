"""Measures perplexity and easy-vqa accuracy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from vlm_safeguard.data.inputs import Query
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.residual_stream import find_decoder


@torch.inference_mode()
def perplexity(loaded: LoadedModel, prompts: Sequence[str], answers: Sequence[str]) -> float:
    """Perplexity of responses under the unguarded LLM, given their prompts.

    Over all response tokens together; empty responses contribute none.

    Raises:
        SafeguardError: no response holds a token.
    """
    tokenizer = loaded.processor.tokenizer
    decoder, head = find_decoder(loaded.model).module, loaded.model.get_output_embeddings()
    total, count = 0.0, 0
    for asked, answer in zip(prompts, answers, strict=True):
        said = tokenizer(answer, add_special_tokens=False, return_tensors="pt").input_ids
        if said.shape[1] == 0:
            continue
        said = said.to(loaded.device)
        prompt = encode(loaded, [asked], [None])["input_ids"]
        states = decoder(input_ids=torch.cat([prompt, said], 1), use_cache=False)[0]
        logits = head(states[:, prompt.shape[1] - 1 : -1]).float()
        total += torch.nn.functional.cross_entropy(logits[0], said[0], reduction="sum").item()
        count += said.shape[1]
    if not count:
        raise SafeguardError("no response holds a token, so there is no perplexity")
    return float(torch.tensor(total / count).exp())


def vqa_questions(count: int) -> list[tuple[Query, str]]:
    """``count`` easy-vqa test questions, evenly spread, each with its answer.

    Raises:
        SafeguardError: the easy-vqa package is not installed.
    """
    easy_vqa = _easy_vqa()
    questions, answers, images = easy_vqa.get_test_questions()
    paths = easy_vqa.get_test_image_paths()
    count = min(count, len(questions))
    found = []
    for i in (n * len(questions) // count for n in range(count)):
        with Image.open(paths[images[i]]) as picture:
            found.append((Query(questions[i], picture.convert("RGB")), answers[i]))
    return found


def vqa_vocabulary() -> set[str]:
    """Every answer that easy-vqa knows."""
    return set(_easy_vqa().get_answers())


def _easy_vqa() -> Any:
    try:
        import easy_vqa
    except ImportError as error:
        raise SafeguardError(
            "easy-vqa is not installed: pip install 'vlm-safeguard[demo]'"
        ) from error
    return easy_vqa


def vqa_answer(reply: str, answer: str, vocabulary: set[str]) -> bool:
    """Whether a reply in a sentence gives ``answer``, and no other of its kind.

    A yes/no question is answered by the only yes or no in the reply; a question for a shape or a
    colour by the only word of that kind.
    """
    words = set(re.findall(r"[a-z]+", reply.lower())) & vocabulary
    shapes = {"circle", "rectangle", "triangle"}
    kinds = ({"yes", "no"}, shapes, vocabulary - shapes - {"yes", "no"})
    kind = next(k for k in kinds if answer in k)
    return words & kind == {answer}
