"""A tiny language model, a tokenizer of bytes and a small bank of pictures."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests import tiny
from tests.checkpoint import byte_tokenizer
from training import common
from training.projector import Bank


@pytest.fixture
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> Any:
    """As training gets it from a file."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**tiny.TEXT)).eval()
    monkeypatch.setattr(common, "load_llm", lambda *_: (model, tokenizer))
    return common.base_model(Namespace(model="embedded", dtype="float32", cache=Path()))[0]


@pytest.fixture
def bank() -> Bank:
    """Features that tell the names apart, as a trained tower's do."""
    names = ["red circle", "blue triangle", "", "cat", "dog", "owl"] * 3 + ["blank"] * 2
    order = sorted(names, key=lambda name: (name == "blank", name in ("cat", "dog", "owl")))
    generator = torch.Generator().manual_seed(1)
    means = {name: torch.randn(4, 16, generator=generator) for name in sorted(set(order))}
    noise = 0.1 * torch.randn(len(order), 4, 16, generator=generator)
    features = torch.stack([means[name] for name in order]) + noise
    return Bank(features, order, range(9), range(9, 18), range(18, 20))
