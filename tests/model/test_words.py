"""The words of a text among its tokens, and the mean of the states over them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import families
from tests.checkpoint import load_with_system
from tests.families import Family
from tests.model.family_helpers import PROMPTS, last_states, loaded_of
from vlm_safeguard.artifact.config import TextFrame
from vlm_safeguard.data.inputs import Query
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.recording import record, record_with_logits
from vlm_safeguard.model.residual_stream import (
    find_decoder,
    hidden_of,
    verify_residual_stream,
)
from vlm_safeguard.model.shared_prefix import SharedPrefix
from vlm_safeguard.model.words import PROBE_WORDS, find_frame, readings, with_probe, word_weights


def words(length: int, before: int, after: int) -> list[int]:
    """Which tokens of a row of ``length`` are averaged over, said once more."""
    return list(range(before, length - after)) or list(range(before, length)) or list(range(length))


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=4),
    st.integers(0, 14),
    st.integers(0, 14),
    st.integers(0, 3),
)
def test_weights_are_those_of_the_words_of_each_row(
    lengths: list[int], before: int, after: int, probe: int
) -> None:
    frame, width = TextFrame(before=before, after=after, probe=[7] * probe), max(lengths) + probe
    weights = word_weights(torch.tensor(lengths) + probe, width, frame)
    for row, length in zip(weights, lengths, strict=True):
        chosen = words(length, before, after)
        expected = torch.zeros(width)
        expected[[width - probe - length + n for n in chosen]] = 1 / len(chosen)
        torch.testing.assert_close(row, expected)


@given(
    st.lists(st.integers(5, 12), min_size=1, max_size=4),
    st.integers(0, 4),
    st.integers(0, 9),
    st.integers(0, 3),
)
def test_a_pass_over_the_rest_of_the_rows_has_the_same_words(
    lengths: list[int], before: int, after: int, probe: int
) -> None:
    """Where keys and values of the beginning are shared, its columns are not computed."""
    frame, width = TextFrame(before=before, after=after, probe=[7] * probe), max(lengths) + probe
    lengths = [length + probe for length in lengths]
    whole = word_weights(torch.tensor(lengths), width, frame)
    rest = word_weights(torch.tensor(lengths), width - before, frame)
    assert torch.equal(rest, whole[:, before:])


def test_a_probe_stands_behind_each_text() -> None:
    """In inputs of a value for each token, which say that it is text, and in no others."""
    ids = torch.tensor([[0, 5, 6], [7, 8, 9]])
    kinds, pixels = torch.tensor([[0, 1, 1], [1, 1, 1]], dtype=torch.int32), torch.ones(2, 3, 4, 4)
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long(), "token_type_ids": kinds}
    found = with_probe(inputs | {"pixel_values": pixels}, [3, 4])
    assert found["input_ids"].tolist() == [[0, 5, 6, 3, 4], [7, 8, 9, 3, 4]]
    assert found["attention_mask"].tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert found["token_type_ids"].tolist() == [[0, 1, 1, 0, 0], [1, 1, 1, 0, 0]]
    assert found["token_type_ids"].dtype == torch.int32 and found["pixel_values"] is pixels
    assert with_probe(inputs, []) == inputs


def test_the_mean_stands_behind_the_last_state() -> None:
    states = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    states[1, 0] = torch.nan  # padding
    weights = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    found = readings(states, weights, 0)
    assert found.dtype == torch.float32 and found.shape == (2, 8)
    exact = states.double()
    expected = [torch.cat([exact[0, 2], exact[0, :2].mean(0)]), exact[1, 2].repeat(2)]
    torch.testing.assert_close(found.double(), torch.stack(expected), atol=1e-6, rtol=1e-6)
    weights = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])
    found = readings(states, weights, 1)
    expected = [torch.cat([exact[0, 1], exact[0, :2].mean(0), exact[0, 2]])]
    expected += [torch.cat([exact[1, 1], exact[1, 1], exact[1, 2]])]
    torch.testing.assert_close(found.double(), torch.stack(expected), atol=1e-6, rtol=1e-6)


@pytest.fixture
def family(one: Family) -> LoadedModel:
    return loaded_of(one)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_with_system(tmp_path_factory.mktemp("tiny"))


def every_state(
    loaded: LoadedModel, item: Query, probe: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """States (L, T, d) of a request by itself with a probe behind it, float64, and the logits
    (T, vocabulary)."""
    seen: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: seen.append(hidden_of(out)[0].double()))
        for layer in find_decoder(loaded.model).layers
    ]
    with torch.no_grad():
        ids = encode(loaded, [item.text], [item.image])["input_ids"]
        logits = loaded.model(torch.cat([ids, ids.new_tensor(probe)[None]], 1)).logits[0]
    for hook in hooks:
        hook.remove()
    return torch.stack(seen), logits


def test_the_frame_is_what_the_template_writes(loaded: LoadedModel) -> None:
    frame = find_frame(loaded)
    assert frame is not None
    shared = SharedPrefix(loaded.model, loaded.processor)
    assert len(shared.tokens) == frame.before
    assert loaded.processor.tokenizer.decode(frame.probe).strip() == PROBE_WORDS


@pytest.mark.parametrize("probed", [True, False])
def test_all_that_is_read_of_a_text_is_recorded(
    loaded: LoadedModel, tmp_path: Path, probed: bool
) -> None:
    """Alone and in a batch, with the logits at the last token of the text and without."""
    items = [Query(text, None) for text in ("How do I bake bread?", "Why?", "Name three birds.")]
    frame, width = find_frame(loaded), find_decoder(loaded.model).hidden_size
    assert frame is not None
    if not probed:
        frame = frame.model_copy(update={"probe": []})
    plain = record(loaded, items, tmp_path).clone()
    every = record(loaded, items, tmp_path, frame=frame).clone()
    assert every.shape == (*plain.shape[:2], (2 + probed) * width)
    close(every[..., :width], plain)
    close(record(loaded, items, tmp_path, frame=frame, batch=1), every)
    told, first = record_with_logits(loaded, items, tmp_path, lambda one: one, frame=frame)
    close(told, every)
    for row, item in enumerate(items):
        states, logits = every_state(loaded, item, frame.probe)
        length = states.shape[1] - len(frame.probe)
        close(first[row], logits[length - 1])
        chosen = words(length, frame.before, frame.after)
        close(every[row, :, width : 2 * width], states[:, chosen].mean(1).float())
        if probed:
            close(every[row, :, 2 * width :], states[:, -1].float())


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_every_family_reads_a_text_with_a_probe_behind_it(
    one: Family, family: LoadedModel, tmp_path: Path
) -> None:
    """Its own last state and logits are those without the probe, whose end is read too."""
    frame = find_frame(family)
    if frame is None:
        assert not one.text_alone or not verify_residual_stream(family.model).whole
        return
    items = [Query(prompt, None) for prompt in PROMPTS]
    plain, logits = record_with_logits(family, items, tmp_path, lambda each: each)
    found, again = record_with_logits(family, items, tmp_path, lambda each: each, frame=frame)
    width = plain.shape[2]
    close(found[..., :width], plain)
    close(again, logits)
    for row, prompt in enumerate(PROMPTS):
        ids = encode(family, [prompt], [None])["input_ids"][0].tolist()
        states = last_states(one, family, ids + frame.probe)
        close(found[row, :, 2 * width :], torch.stack([states[n] for n in range(families.LAYERS)]))
