"""The words of a text among its tokens, and the mean of the states over them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.checkpoint import load_with_system
from vlm_safeguard.artifact.config import TextFrame
from vlm_safeguard.data.inputs import Query
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.recording import record, record_with_logits
from vlm_safeguard.model.residual_stream import find_decoder, hidden_of
from vlm_safeguard.model.shared_prefix import SharedPrefix
from vlm_safeguard.model.words import find_frame, with_mean, word_weights


def words(length: int, before: int, after: int) -> list[int]:
    """Which tokens of a row of ``length`` are averaged over, said once more."""
    return list(range(before, length - after)) or list(range(before, length)) or list(range(length))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(0, 14), st.integers(0, 14))
def test_weights_are_those_of_the_words_of_each_row(
    lengths: list[int], before: int, after: int
) -> None:
    frame, width = TextFrame(before=before, after=after), max(lengths)
    weights = word_weights(torch.tensor(lengths), width, frame)
    for row, length in zip(weights, lengths, strict=True):
        chosen = words(length, before, after)
        expected = torch.zeros(width)
        expected[[width - length + n for n in chosen]] = 1 / len(chosen)
        torch.testing.assert_close(row, expected)


@given(st.lists(st.integers(5, 12), min_size=1, max_size=4), st.integers(0, 4), st.integers(0, 9))
def test_a_pass_over_the_rest_of_the_rows_has_the_same_words(
    lengths: list[int], before: int, after: int
) -> None:
    """Where keys and values of the beginning are shared, its columns are not computed."""
    frame, width = TextFrame(before=before, after=after), max(lengths)
    whole = word_weights(torch.tensor(lengths), width, frame)
    rest = word_weights(torch.tensor(lengths), width - before, frame)
    assert torch.equal(rest, whole[:, before:])


def test_the_mean_stands_behind_the_last_state() -> None:
    states = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    states[1, 0] = torch.nan  # padding
    weights = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    found = with_mean(states, weights)
    assert found.dtype == torch.float32 and found.shape == (2, 8)
    exact = states.double()
    expected = [torch.cat([exact[0, 2], exact[0, :2].mean(0)]), exact[1, 2].repeat(2)]
    torch.testing.assert_close(found.double(), torch.stack(expected), atol=1e-6, rtol=1e-6)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_with_system(tmp_path_factory.mktemp("tiny"))


def every_state(loaded: LoadedModel, item: Query) -> torch.Tensor:
    """States (L, T, d) of a request by itself, float64."""
    seen: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: seen.append(hidden_of(out)[0].double()))
        for layer in find_decoder(loaded.model).layers
    ]
    with torch.no_grad():
        loaded.model(**encode(loaded, [item.text], [item.image]))
    for hook in hooks:
        hook.remove()
    return torch.stack(seen)


def test_the_frame_is_what_the_template_writes(loaded: LoadedModel) -> None:
    frame = find_frame(loaded.processor)
    assert frame is not None
    shared = SharedPrefix(loaded.model, loaded.processor)
    assert len(shared.tokens) == frame.before


def test_means_are_recorded_behind_the_states(loaded: LoadedModel, tmp_path: Path) -> None:
    """Alone and in a batch, with the logits and without."""
    items = [Query(text, None) for text in ("How do I bake bread?", "Why?", "Name three birds.")]
    frame, width = find_frame(loaded.processor), find_decoder(loaded.model).hidden_size
    plain = record(loaded, items, tmp_path).clone()
    both = record(loaded, items, tmp_path, frame=frame).clone()
    assert both.shape == (*plain.shape[:2], 2 * width)
    torch.testing.assert_close(both[..., :width], plain, atol=1e-4, rtol=1e-3)
    alone = record(loaded, items, tmp_path, frame=frame, batch=1).clone()
    torch.testing.assert_close(alone, both, atol=1e-4, rtol=1e-3)
    told, _ = record_with_logits(loaded, items, tmp_path, lambda one: one[:, 0], frame=frame)
    torch.testing.assert_close(told, both, atol=1e-4, rtol=1e-3)
    assert frame is not None
    for row, item in enumerate(items):
        states = every_state(loaded, item)
        chosen = words(states.shape[1], frame.before, frame.after)
        expected = states[:, chosen].mean(1).float()
        torch.testing.assert_close(both[row, :, width:], expected, atol=1e-4, rtol=1e-3)
