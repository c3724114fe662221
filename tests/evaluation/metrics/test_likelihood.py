"""Perplexity, against the logits of the whole model in float64."""

from __future__ import annotations

import math

import pytest
import torch

from tests import checkpoint
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.metrics.likelihood import perplexity
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.loading import LoadedModel, load

ASKED, SAID = ["How do I water plants?", "Hi"], ["Use a can.", "Hello there"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(checkpoint.save(tmp_path_factory.mktemp("tiny")))


def reference(loaded: LoadedModel, asked: str, said: str) -> list[float]:
    """Log-probability of each token of ``said``, one forward pass for each."""
    ids = encode(loaded, [asked], [None])["input_ids"][0].tolist()
    found = []
    for token in loaded.processor.tokenizer(said, add_special_tokens=False)["input_ids"]:
        with torch.inference_mode():
            logits = loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        found.append(float(logits[token] - logits.logsumexp(0)))
        ids.append(token)
    return found


def test_perplexity_is_over_all_tokens_together(loaded: LoadedModel) -> None:
    told = [one for pair in zip(ASKED, SAID, strict=True) for one in reference(loaded, *pair)]
    expected = math.exp(-sum(told) / len(told))
    assert perplexity(loaded, [*ASKED, "Yes?"], [*SAID, ""]) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(SafeguardError, match="no response holds a token"):
        perplexity(loaded, ["Yes?"], [""])
