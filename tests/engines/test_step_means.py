"""Gates that read the mean over a text's words, in flattened batches that hold parts of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.engines.test_step import LAYERS, rows_of, step_of, streams
from vlm_safeguard.artifact.config import TextFrame
from vlm_safeguard.engines.vllm.messages import Role
from vlm_safeguard.engines.vllm.watched import Watched
from vlm_safeguard.engines.vllm.word_sums import WordSums
from vlm_safeguard.guard import Guard
from vlm_safeguard.runtime.request import Request

FRAME = TextFrame(before=2, after=1)
WIDTH = 9  # tokens of a text, of which six are words
UNSEEN = "words of its text were not computed under guard, and a gate reads their mean"


@dataclass
class Row:
    """A request, and what each layer puts out for all its tokens."""

    watched: Watched
    states: list[tuple[Tensor, Tensor]]


@pytest.fixture
def guard(model) -> Guard:
    gates = [tiny.gate("text", 1, 4, reads_mean=True), tiny.gate("text", 4), tiny.gate("vlm", 2)]
    return tiny.guard(model, gates, frame=FRAME, layers=list(LAYERS), reference="anchor", tokens=2)


def text(guard: Guard, seed: int = 0, width: int = WIDTH) -> Row:
    request = Request(guard.config.gates, width, [width - 1], [0])
    role = Role("", "user", 0, width, True, False, False)
    watched = Watched(f"user#text{seed}", role, request, width, WordSums(width, FRAME))
    return Row(watched, streams(seed, width))


def run(guard: Guard, rows: Sequence[Row], columns: Sequence[range]) -> list[Watched]:
    """One pass over these columns of each. Returns the requests whose prompt has ended."""
    step = step_of(guard, rows_of([row.watched for row in rows], list(columns)))
    for layer in LAYERS:
        parts = [
            [half[part.start : part.stop] for half in row.states[layer]]
            for row, part in zip(rows, columns, strict=True)
        ]
        hidden, residual = (torch.cat(halves) for halves in zip(*parts, strict=True))
        step.visit(layer, hidden, residual)
    return step.finish()


def words_of(width: int) -> range:
    """The columns of the words, without which those behind what comes before, or all."""
    choices = (range(FRAME.before, width - FRAME.after), range(FRAME.before, width), range(width))
    return next(words for words in choices if len(words))


def check(guard: Guard, row: Row) -> None:
    """Compare the scores of both text gates with the formula in float64."""
    width = row.watched.width
    words = words_of(width)
    expected = [0.0, 0.0]
    for index, gate in enumerate(guard.config.gates[:2]):
        for place, layer in enumerate(gate.layers):
            states = sum(half.double() for half in row.states[layer])
            seen = [states[width - 1]]
            if gate.reads_mean:
                seen.append(states[words.start : words.stop].mean(0))
            vector = guard.tensors[f"gate.{index}"][place].double()
            expected[index] += float(torch.cat(seen) @ vector)
    report = row.watched.report()
    assert not report.failed
    found = [sum((report.scores or {})[f"text.{index}"]) for index in range(2)]
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("width", range(1, WIDTH + 1))
def test_a_text_is_read_at_its_last_token_and_over_its_words(guard: Guard, width: int) -> None:
    """The shortest have no words: what is behind their place is averaged, or else all."""
    row = text(guard, width=width)
    assert run(guard, [row], [range(width)]) == [row.watched]
    check(guard, row)


@pytest.mark.parametrize("width", [2, 3, WIDTH])
def test_a_text_in_parts_is_read_as_a_whole_one(guard: Guard, width: int) -> None:
    for first in range(1, width):
        for second in range(first, width):
            row = text(guard, width=width)
            parts = [range(first), range(first, second), range(second, width)]
            for part in filter(len, parts):
                run(guard, [row], [part])
            check(guard, row)


@pytest.mark.parametrize("seen", range(1, WIDTH))
def test_a_preempted_text_is_summed_anew(guard: Guard, seen: int) -> None:
    row = text(guard)
    for part in (range(1), range(1, seen), range(4), range(4, WIDTH)):
        if part:
            run(guard, [row], [part])
    check(guard, row)


def test_texts_are_summed_apart_from_each_other_and_from_other_rows(guard: Guard) -> None:
    """A text in three parts, one in two, a whole one, and a user's request that is steered."""
    opened = tiny.with_thresholds(guard, [[0.0, 0.0], [0.0], [-1e9]])
    slow, quick, whole, first = (text(guard, seed, WIDTH - seed) for seed in range(4))
    run(opened, [slow, first], [range(3), range(first.watched.width)])
    role = Role("", "", 1, 0, True, False, False)
    user = Row(Watched("user", role, first.watched.request, 5), streams(9, 8))
    run(opened, [quick, user, slow], [range(4), range(4), range(3, 7)])
    ended = run(
        opened,
        [slow, user, whole, quick],
        [range(7, 9), range(4, 5), range(whole.watched.width), range(4, quick.watched.width)],
    )
    assert ended == [row.watched for row in (slow, user, whole, quick)]
    for row in (slow, quick, whole, first):
        check(guard, row)
    assert user.watched.report().by_vlm


def test_a_text_whose_states_are_no_numbers_fails_alone(guard: Guard) -> None:
    whole, broken = text(guard, 0), text(guard, 1)
    broken.states[1][0][4] = torch.nan
    for part in (range(5), range(5, WIDTH)):
        run(guard, [broken, whole], [part, part])
    check(guard, whole)
    assert "NaN or Inf" in broken.watched.failed


@pytest.mark.parametrize("begin", range(WIDTH))
@pytest.mark.parametrize("seen", [0, 5])
def test_words_that_no_pass_has_shown_fail_their_text(guard: Guard, begin: int, seen: int) -> None:
    """What comes before the words may be missing: it is not in the mean."""
    row, other = text(guard, 0), text(guard, 1)
    if seen:
        run(guard, [row], [range(seen)])
    run(guard, [other, row], [range(WIDTH), range(begin, WIDTH)])
    check(guard, other)
    if begin <= FRAME.before or begin == seen:
        check(guard, row)
    else:
        assert row.watched.report().failed == UNSEEN


def test_a_gap_between_parts_fails_the_text(guard: Guard) -> None:
    row = text(guard)
    run(guard, [row], [range(4)])
    run(guard, [row], [range(5, 7)])
    assert run(guard, [row], [range(7, WIDTH)]) == [row.watched]
    assert row.watched.report().failed == UNSEEN
