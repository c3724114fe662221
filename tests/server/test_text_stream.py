"""Pieces of text against the whole text; tokens against the distribution they are drawn from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlm_safeguard.model.loading import load
from vlm_safeguard.server.job import Sampling
from vlm_safeguard.server.sampling import RowSampling
from vlm_safeguard.server.text_stream import TextStream


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Any:
    return load(folder).processor.tokenizer


def streamed(tokenizer: Any, text: str, stop: tuple[str, ...]) -> tuple[list[str], bool]:
    stream, pieces = TextStream(tokenizer, stop), []
    for token in tokenizer(text, add_special_tokens=False).input_ids:
        pieces.append(stream.add(token))
        if stream.stopped:
            break
    return [*pieces, stream.end()], stream.stopped


@given(
    st.text("abc é✓", max_size=30), st.lists(st.text("abc é", min_size=1, max_size=4), max_size=3)
)
def test_text_ends_before_the_first_stop_sequence(
    tokenizer: Any, text: str, stop: list[str]
) -> None:
    found = [at for at in map(text.find, stop) if at >= 0]
    pieces, stopped = streamed(tokenizer, text, tuple(stop))
    assert "".join(pieces) == (text[: min(found)] if found else text)
    assert stopped == bool(found)


def test_a_character_that_was_cut_shows_as_in_the_whole_text(tokenizer: Any) -> None:
    tokens = tokenizer("a✓", add_special_tokens=False).input_ids[:-1]
    stream = TextStream(tokenizer, ())
    pieces = [*map(stream.add, tokens), stream.end()]
    assert "".join(pieces) == tokenizer.decode(tokens) == "a\ufffd"


def test_nothing_of_a_stop_sequence_is_said_early(tokenizer: Any) -> None:
    assert streamed(tokenizer, "xaab", ("aab",)) == (["x", "", "", "", ""], True)
    assert streamed(tokenizer, "xaac", ("aab",)) == (["x", "", "", "aac", ""], False)


def test_tokens_come_as_often_as_their_probability_says() -> None:
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0]).log_softmax(0)
    expected = torch.softmax(scores / 0.7, 0)
    kept = expected.cumsum(0) - expected < 0.9  # the fewest that reach top-p
    expected = torch.where(kept, expected, 0.0) / expected[kept].sum()
    draws = 4000
    rows = [Sampling(1, temperature=0.7, top_p=0.9, seed=seed) for seed in range(draws)]
    chosen = RowSampling(rows)(torch.zeros(draws, 1), scores.repeat(draws, 1)).argmax(1)
    often = torch.bincount(chosen, minlength=4) / draws
    assert often[~kept].sum() == 0
    assert torch.allclose(often, expected, atol=4 * (0.25 / draws) ** 0.5)


def test_a_row_draws_the_same_whoever_is_beside_it() -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 50)
    own = Sampling(1, temperature=1.0, seed=7)
    alone = RowSampling([own])(torch.zeros(1, 1), scores[:1]).argmax(1)
    for mate in (Sampling(1), Sampling(1, temperature=2.0, seed=1)):
        beside = RowSampling([own, mate])(torch.zeros(2, 1), scores).argmax(1)
        assert beside[0] == alone[0]
    greedy = RowSampling([own, Sampling(1)])(torch.zeros(2, 1), scores)
    assert torch.equal(greedy[1], scores[1])
