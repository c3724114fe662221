"""The precision of products is set for a while."""

from __future__ import annotations

import pytest
import torch

from vlm_safeguard.utils.matmul import float32_products


def test_a_precision_lasts_until_the_end_of_its_block() -> None:
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), float32_products("medium"):
        assert torch.get_float32_matmul_precision() == "medium"
        raise KeyError
    assert torch.get_float32_matmul_precision() == before


def test_the_highest_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses to tell it where the precision was set in another way."""
    for name in ("get_float32_matmul_precision", "set_float32_matmul_precision"):
        monkeypatch.setattr(torch, name, None)
    with float32_products("highest"):
        pass
