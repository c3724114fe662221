"""Ways of generating on families that work otherwise than LLaVA: each row of a batch with a picture
gets what its prompt gives alone, whether the gate is open for it or shut."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import families
from tests.families import FAMILIES
from tests.model.family_helpers import NEVER, PROMPTS, guard_for, half_open, loaded_of
from tests.reference import CLOSE
from tests.tiny import generate
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.loading import LoadedModel

# Each for what sets it apart.
NAMES = [
    "llava_onevision",  # several crops of a picture
    "qwen2_vl",  # positions in three dimensions
    "qwen3_vl",  # and features of the picture put in at several layers
    "qwen3_vl_moe",  # experts
    "qwen3_5",  # linear attention
    "gemma3",  # sliding windows, and a picture's tokens attend both ways
    "gemma4",  # upper layers compute the last column alone
    "mllama",  # cross-attention
    "idefics3_split",  # tiles with text between them
]
WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 2, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "in chunks": {"prefill_chunk_size": 3},  # pictures are cut through
}
ROUNDED = {"atol": 0.15, "rtol": 0.0}  # logits are about 6, and steering moves them by 1 to 4
SOURCES = pytest.mark.parametrize("source", ["text", "vlm"])
pytestmark = pytest.mark.parametrize("name", NAMES)


def requests(loaded: LoadedModel) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Two with pictures of different sizes, as one batch and each alone."""
    pictures = [families.photo(1), families.photo(2, 60, 40)]
    alone = [encode(loaded, [p], [i]) for p, i in zip(PROMPTS, pictures, strict=True)]
    return encode(loaded, PROMPTS, pictures), alone


def replay(model: Any, inputs: dict[str, Tensor], answer: list[int]) -> Tensor:
    """Logits (T, vocabulary) of one request by itself, in one pass and then step by step, led along
    the T tokens of an answer."""
    width = inputs["input_ids"].shape[1]
    _, logits = generate(
        model,
        inputs,
        max_new_tokens=len(answer),
        prefix_allowed_tokens_fn=lambda _, ids: [answer[len(ids) - width]],
    )
    return logits[0]


def holds(
    model: Any,
    made: Guard,
    opened: int,
    alone: list[dict[str, Tensor]],
    tokens: Tensor,
    logits: Tensor,
    within: dict[str, Any] = CLOSE,
) -> None:
    """Each row's logits are those of its request alone under the guard; the guard moves those of
    the row it opened, and no others."""
    copies = len(tokens) // len(alone)
    for row, (answer, table) in enumerate(zip(tokens.tolist(), logits, strict=True)):
        request = alone[row // copies]
        with made.attach(model):
            own = replay(model, request, answer)
        plain = replay(model, request, answer)
        torch.testing.assert_close(table, own, **within)
        if row // copies == opened:
            assert (own - plain).abs().max() > 2 * ROUNDED["atol"]
        else:
            torch.testing.assert_close(table, plain, **within)


@SOURCES
@pytest.mark.parametrize("way", WAYS)
def test_a_way_of_generating(name: str, way: str, source: str) -> None:
    one, loaded = FAMILIES[name], loaded_of(FAMILIES[name])
    model, options = loaded.model, dict(WAYS[way])
    inputs, alone = requests(loaded)
    made, opened = half_open(loaded, guard_for(one, loaded, 0.0, source), inputs)
    if (name, way) == ("mllama", "in chunks"):  # not without a guard either
        for guarded in (nullcontext(), made.attach(model)):
            with guarded, pytest.raises(ValueError, match="cannot split the raw multimodal inputs"):
                generate(model, inputs, **options)
        return
    if (name, way) == ("gemma3", "in chunks"):
        # Cut through, a picture's tokens cannot attend to those of it that come later: that is
        # not what the model gives in one pass, without a guard either.
        cut, whole = generate(model, inputs, **options)[1], generate(model, inputs)[1]
        assert (cut - whole).abs().max() > 1e-3
        with guard_for(one, loaded, NEVER, source).attach(model):
            assert torch.equal(generate(model, inputs, **options)[1], cut)
        pictured = (inputs["input_ids"] == model.config.image_token_id).any(0).nonzero()
        options["prefill_chunk_size"] = int(pictured.max()) + 1
    torch.manual_seed(0)
    with made.attach(model) as session:
        tokens, logits = generate(model, inputs, **options)
        copies = len(tokens) // len(alone)
        assert [d.fired for d in session.decisions] == [
            row // copies == opened for row in range(len(tokens))
        ]
    holds(model, made, opened, alone, tokens, logits)


@SOURCES
def test_half_precision(name: str, source: str) -> None:
    one, loaded = FAMILIES[name], FAMILIES[name].build()
    loaded.model.to(torch.bfloat16)
    inputs, alone = requests(loaded)
    made, opened = half_open(loaded, guard_for(one, loaded, 0.0, source), inputs)
    with made.attach(loaded.model):
        tokens, logits = generate(loaded.model, inputs)
    holds(loaded.model, made, opened, alone, tokens, logits, ROUNDED)


@SOURCES
def test_a_forward_call_padded_on_the_right(
    name: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, loaded = FAMILIES[name], loaded_of(FAMILIES[name])
    inputs, alone = requests(loaded)
    made, opened = half_open(loaded, guard_for(one, loaded, 0.0, source), inputs)
    monkeypatch.setattr(loaded.processor.tokenizer, "padding_side", "right")
    inputs, _ = requests(loaded)
    mask = inputs["attention_mask"]
    assert mask[:, 0].all() and not mask[:, -1].all()
    with torch.no_grad(), made.attach(loaded.model) as session:
        logits = loaded.model(**inputs).logits[[0, 1], mask.sum(1) - 1, None]
        assert [d.fired for d in session.decisions] == [opened == 0, opened == 1]
    holds(loaded.model, made, opened, alone, logits.argmax(-1), logits)
