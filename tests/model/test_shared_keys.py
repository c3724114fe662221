"""Layers that put out the last columns of a prompt alone, as Gemma 4's do that share their keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import families, tiny
from tests.families import FAMILIES
from tests.model.family_helpers import PROMPTS, decoder_of, guard_for, last_states
from tests.reference import close
from tests.tiny import generate
from vlm_safeguard.artifact.config import TextFrame
from vlm_safeguard.data.inputs import Query
from vlm_safeguard.errors import GuardRuntimeError, ModelError
from vlm_safeguard.model.chat import encode, process, render
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.recording import record
from vlm_safeguard.model.words import find_frame

ONE = FAMILIES["gemma4"]
SHARED = 2  # the first layer that computes the last column alone


@pytest.fixture(scope="module")
def gemma() -> LoadedModel:
    return ONE.build()


def test_states_are_recorded_where_only_the_last_column_is_computed(
    gemma: LoadedModel, tmp_path: Path
) -> None:
    widths: dict[int, int] = {}
    layers = decoder_of(ONE, gemma).layers
    handles = [
        layer.register_forward_hook(
            lambda _, __, output, n=n: widths.__setitem__(n, output.shape[1])
        )
        for n, layer in enumerate(layers)
    ]
    states = record(gemma, [Query(prompt, None) for prompt in PROMPTS], tmp_path)
    for handle in handles:
        handle.remove()
    assert widths[0] > 1 and widths[SHARED] == widths[SHARED + 1] == 1
    for row, prompt in enumerate(PROMPTS):
        text = render(gemma.processor, prompt)
        ids = gemma.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        expected = last_states(ONE, gemma, ids)
        close(states[row], torch.stack([expected[n] for n in range(families.LAYERS)]))


def test_no_means_are_recorded_where_a_layer_does_not_put_out_all_words(
    gemma: LoadedModel, tmp_path: Path
) -> None:
    assert find_frame(gemma) is None
    items, frame = [Query(prompt, None) for prompt in PROMPTS], TextFrame(before=1, after=1)
    with pytest.raises(ModelError, match="does not put out the states of all words"):
        record(gemma, items, tmp_path, frame=frame)
    gate = tiny.gate("text", SHARED, reads_mean=True)
    made = tiny.guard(gemma.model, [gate], frame=frame, layers=[1])
    made = tiny.changed(made, markup=guard_for(ONE, gemma).config.markup)
    with (
        made.attach(gemma.model),
        pytest.raises(GuardRuntimeError, match="does not put out all of its words"),
    ):
        gemma.model(**encode(gemma, PROMPTS[:1], [None]))


def test_a_row_whose_last_token_is_left_out_is_refused(gemma: LoadedModel) -> None:
    """Padded on the right, its prompt ends before the only column that there is."""
    texts = [render(gemma.processor, prompt) for prompt in PROMPTS]
    right = process(gemma.processor, texts, [[], []], padding_side="right")
    left = encode(gemma, PROMPTS, [None, None])
    with guard_for(ONE, gemma).attach(gemma.model), torch.no_grad():
        whole = gemma.model(**right).logits  # all columns: every layer has q
        ends = right["attention_mask"].sum(1) - 1
        expected = gemma.model(**left).logits[:, -1]
        close(whole[torch.arange(2), ends], expected)
        close(gemma.model(**left, logits_to_keep=1).logits[:, -1], expected)
        with pytest.raises(GuardRuntimeError, match=r"layer 2 puts out the last 1 columns only"):
            gemma.model(**right, logits_to_keep=1)


def test_steering_of_the_whole_prompt_is_refused_where_it_is_not_put_out(
    gemma: LoadedModel,
) -> None:
    inputs = encode(gemma, PROMPTS[:1], [families.photo(1)])
    made = guard_for(ONE, gemma, positions="all")
    with made.attach(gemma.model):
        gemma.model(**inputs)
        with pytest.raises(GuardRuntimeError, match="positions `all` cannot be guarded here"):
            generate(gemma.model, inputs)
