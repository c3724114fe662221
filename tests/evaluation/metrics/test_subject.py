"""What an answer owes to its request, against sums over single tokens in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from tests import checkpoint
from vlm_safeguard.evaluation.metrics import subject
from vlm_safeguard.evaluation.metrics.subject import (
    agreement,
    held_out_agreement,
    others_of,
    subject_information,
    threshold_from,
)
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.utils.stats import wilson

ASKED = ["How do I water plants?", "Hi", "Name a bird.", "What is snow?"]
SAID = ["Use a can.", "Hello there, you", "A wren", "Frozen rain"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return checkpoint.load_with_system(tmp_path_factory.mktemp("tiny"))


def log_likelihood(loaded: LoadedModel, asked: str, said: str) -> float:
    """The sum over the tokens of ``said``, one forward pass for each."""
    ids = encode(loaded, [asked], [None])["input_ids"][0].tolist()
    total = 0.0
    for token in loaded.processor.tokenizer(said, add_special_tokens=False)["input_ids"]:
        with torch.inference_mode():
            logits = loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        total += float(logits[token] - logits.logsumexp(0))
        ids.append(token)
    return total


def test_information_is_the_log_ratio_to_the_mean_over_other_requests(loaded: LoadedModel) -> None:
    found = subject_information(loaded, ASKED, SAID, others_of(ASKED))
    for own, said, value in zip(ASKED, SAID, found, strict=True):
        others = [log_likelihood(loaded, asked, said) for asked in ASKED if asked != own]
        mean = sum(map(math.exp, others)) / len(others)
        tokens = len(said)  # the tokenizer reads bytes
        expected = (log_likelihood(loaded, own, said) - math.log(mean)) / tokens
        assert value == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 16])
@pytest.mark.parametrize("side", ["left", "right"])
def test_neither_the_batch_nor_the_side_of_padding_counts(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, batch: int, side: str
) -> None:
    alone = [
        subject_information(loaded, [own], [said], [others])[0]
        for own, said, others in zip(ASKED, SAID, others_of(ASKED), strict=True)
    ]
    monkeypatch.setattr(loaded.processor.tokenizer, "padding_side", side)
    found = subject_information(loaded, ASKED, SAID, others_of(ASKED), batch=batch)
    assert found == pytest.approx(alone, abs=1e-5)


def test_a_request_is_run_once_for_all_answers(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def counted(loaded: Any, texts: Sequence[str], pictures: Any) -> Any:
        asked.extend(texts)
        return encode(loaded, texts, pictures)

    monkeypatch.setattr(subject, "encode", counted)
    subject_information(loaded, ASKED, SAID, others_of(ASKED))
    assert sorted(asked) == sorted(ASKED)


@pytest.fixture
def planted(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Adds to the logits what makes each token of a request's own answer likely after it."""
    tokenizer = loaded.processor.tokenizer
    begins = {
        tuple(encode(loaded, [asked], [None])["input_ids"][0].tolist()): tokenizer(
            said, add_special_tokens=False
        )["input_ids"]
        for asked, said in zip(ASKED, SAID, strict=True)
    }
    plain, begun = loaded.model.forward, []

    def forward(input_ids: torch.Tensor, **options: Any) -> Any:
        output = plain(input_ids=input_ids, **options)
        if subject.NAME not in options:
            begun[:] = input_ids[0].tolist()
            return output
        for column in range(input_ids.shape[1]):
            own = begins[*begun, int(input_ids[0, 0])]
            if column < len(own):
                output.logits[:, column, own[column]] += 20.0
        return output

    def plant() -> None:
        monkeypatch.setattr(loaded.model, "forward", forward)

    return plant


def test_a_planted_answer_is_above_all_shuffled_ones(
    loaded: LoadedModel, planted: Callable[[], None]
) -> None:
    planted()
    own = subject_information(loaded, ASKED, SAID, others_of(ASKED))
    for turn in range(1, len(SAID)):
        shuffled = SAID[turn:] + SAID[:turn]
        other = subject_information(loaded, ASKED, shuffled, others_of(ASKED))
        assert min(own) > 0 > max(other)


def test_an_empty_answer_has_no_value_and_is_above_no_threshold(loaded: LoadedModel) -> None:
    found = subject_information(loaded, ASKED, ["", *SAID[1:]], others_of(ASKED))
    expected = subject_information(loaded, ASKED[1:], SAID[1:], others_of(ASKED)[1:])
    assert math.isnan(found[0]) and found[1:] == pytest.approx(expected, abs=1e-5)
    assert math.isnan(subject_information(loaded, ASKED[:1], [""], [ASKED[1:]])[0])
    assert threshold_from([False, False, True], [math.nan, 1.0, 2.0]) == 1.5
    assert agreement([False], [math.nan], ["a"], -100.0).count == 1


def test_other_requests_are_needed(loaded: LoadedModel) -> None:
    for others in ([], [ASKED[0], "Hi"]):
        with pytest.raises(ValueError, match="needs other requests"):
            subject_information(loaded, ASKED[:1], SAID[:1], [others])


def test_others_are_spread_and_never_the_request_itself() -> None:
    texts = [f"request {n}" for n in range(20)] + ["request 3"]
    found = others_of(texts, 4)
    assert found[3] == found[20] == [f"request {n}" for n in (4, 8, 13, 18)]
    assert all(
        own not in rest and len(set(rest)) == 4 for own, rest in zip(texts, found, strict=True)
    )
    assert others_of(["a", "b"], 4) == [["b"], ["a"]]


# -- a threshold from labels -----------------------------------------------------------------------


def test_the_threshold_has_the_best_balanced_accuracy() -> None:
    labels = [False] * 3 + [True] * 30
    scores = [-1.0, 0.2, 0.4, 0.3] + [0.5 + n for n in range(29)]
    found = threshold_from(labels, scores)
    assert found == pytest.approx(0.45)  # 3/3 and 29/30, where 0.25 would find 2/3 and 30/30
    assert agreement(labels, scores, [str(n) for n in range(33)], found) == wilson(32, 33)


def test_where_thresholds_are_equally_good_the_one_nearest_to_zero_is_taken() -> None:
    assert threshold_from([False, True], [-3.0, 5.0]) == 0.0
    assert threshold_from([False, True], [2.0, 5.0]) == 3.5
    with pytest.raises(ValueError, match="on the subject and off it"):
        threshold_from([True, True], [1.0, 2.0])


def test_a_label_is_held_against_a_threshold_that_did_not_see_it() -> None:
    labels, scores = [False, False, True, True], [-2.0, 3.0, 2.0, 4.0]
    names = ["a", "b", "c", "d"]
    # Without b the threshold is 0, and b above it. Without c it is 3.5, and c below it.
    assert held_out_agreement(labels, scores, names) == wilson(2, 4)
