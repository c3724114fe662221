"""How likely the unguarded LLM finds a response."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.loading import LoadedModel


def perplexity(loaded: LoadedModel, prompts: Sequence[str], answers: Sequence[str]) -> float:
    """Perplexity of responses under the unguarded LLM, given their prompts.

    Over all response tokens together; empty responses contribute none.

    Raises:
        SafeguardError: no response holds a token.
    """
    pairs = zip(prompts, answers, strict=True)
    told = torch.cat([_log_probabilities(loaded, asked, answer) for asked, answer in pairs])
    if not len(told):
        raise SafeguardError("no response holds a token, so there is no perplexity")
    return math.exp(-told.mean().item())


@torch.inference_mode()
def _log_probabilities(loaded: LoadedModel, prompt: str, answer: str) -> Tensor:
    """Log-probabilities (k,) of the k tokens of ``answer`` after ``prompt``, asked as text."""
    said = loaded.processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
    if not said:
        return torch.empty(0)
    asked = encode(loaded, [prompt], [None])["input_ids"]
    answered = torch.tensor([said], device=asked.device)
    whole = torch.cat([asked, answered], 1)
    logits = loaded.model(input_ids=whole, use_cache=False, logits_to_keep=len(said) + 1).logits
    return logits[0, :-1].float().log_softmax(-1).gather(1, answered.T).squeeze(1).cpu()
