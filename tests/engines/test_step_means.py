"""Gates that read the mean over a text's words and a probe, in flattened batches of their parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.engines.test_step import LAYERS, rows_of, step_of, streams
from vlm_safeguard.artifact.config import Gate, TextFrame
from vlm_safeguard.engines.vllm.messages import Role
from vlm_safeguard.engines.vllm.step import Step
from vlm_safeguard.engines.vllm.watched import Watched
from vlm_safeguard.engines.vllm.word_sums import WordSums
from vlm_safeguard.guard import Guard
from vlm_safeguard.runtime.request import Request

FRAMES = {
    "no probe": TextFrame(before=2, after=1),
    "probe": TextFrame(before=2, after=1, probe=[7, 8]),
}
WIDTH = 9  # tokens of a text, of which six are words; a probe comes behind them
UNSEEN = "words of its text were not computed under guard, and a gate reads all of them"


@dataclass
class Row:
    """A request, and what each layer puts out for all its tokens."""

    watched: Watched
    states: list[tuple[Tensor, Tensor]]


@pytest.fixture(params=FRAMES)
def guard(model, request: pytest.FixtureRequest) -> Guard:
    frame = FRAMES[request.param]
    first = tiny.gate("text", 1, 4, reads_mean=True, reads_probe=bool(frame.probe))
    gates = [first, tiny.gate("text", 4), tiny.gate("vlm", 2)]
    return tiny.guard(model, gates, frame=frame, layers=list(LAYERS), reference="anchor", tokens=2)


def frame_of(guard: Guard) -> TextFrame:
    assert guard.config.frame is not None
    return guard.config.frame


def text(guard: Guard, seed: int = 0, width: int = WIDTH) -> Row:
    """A text of ``width`` tokens, with the guard's probe behind them."""
    width += len(frame_of(guard).probe)
    request = Request(guard.config.gates, width, [width - 1], [0])
    role = Role("", "user", 0, width, True, False, False)
    watched = Watched(f"user#text{seed}", role, request, width, WordSums(width, frame_of(guard)))
    return Row(watched, streams(seed, width))


def visited(guard: Guard, rows: Sequence[Row], columns: Sequence[range]) -> Step:
    """A pass over these columns of each, whose layers have run."""
    step = step_of(guard, rows_of([row.watched for row in rows], list(columns)))
    for layer in LAYERS:
        parts = [
            [half[part.start : part.stop] for half in row.states[layer]]
            for row, part in zip(rows, columns, strict=True)
        ]
        hidden, residual = (torch.cat(halves) for halves in zip(*parts, strict=True))
        step.visit(layer, hidden, residual)
    return step


def run(guard: Guard, rows: Sequence[Row], columns: Sequence[range]) -> list[Watched]:
    """One such pass. Returns the requests whose prompt has ended."""
    return visited(guard, rows, columns).finish()


def words_of(guard: Guard, width: int) -> range:
    """The columns of the words, without which those behind what comes before, or all."""
    frame = frame_of(guard)
    choices = (range(frame.before, width - frame.after), range(frame.before, width), range(width))
    return next(words for words in choices if len(words))


def check(guard: Guard, row: Row) -> None:
    """Compare the scores of both text gates with the formula in float64."""
    probe = len(frame_of(guard).probe)
    width = row.watched.width - probe
    words = words_of(guard, width)
    expected = [0.0, 0.0]
    for index, gate in enumerate(guard.config.gates[:2]):
        for place, layer in enumerate(gate.layers):
            states = sum(half.double() for half in row.states[layer])
            seen = [states[width - 1]]
            if gate.reads_mean:
                seen.append(states[words.start : words.stop].mean(0))
            if gate.reads_probe:
                seen.append(states[width + probe - 1])
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
    assert run(guard, [row], [range(row.watched.width)]) == [row.watched]
    check(guard, row)


@pytest.mark.parametrize("width", [2, 3, WIDTH])
def test_a_text_in_parts_is_read_as_a_whole_one(guard: Guard, width: int) -> None:
    whole = width + len(frame_of(guard).probe)
    for first in range(1, whole):
        for second in range(first, whole):
            row = text(guard, width=width)
            parts = [range(first), range(first, second), range(second, whole)]
            for part in filter(len, parts):
                run(guard, [row], [part])
            check(guard, row)


@pytest.mark.parametrize("seen", range(1, WIDTH + 1))
def test_a_preempted_text_is_summed_anew(guard: Guard, seen: int) -> None:
    row = text(guard)
    for part in (range(1), range(1, seen), range(4), range(4, row.watched.width)):
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
        [
            range(7, slow.watched.width),
            range(4, 5),
            range(whole.watched.width),
            range(4, quick.watched.width),
        ],
    )
    assert ended == [row.watched for row in (slow, user, whole, quick)]
    for row in (slow, quick, whole, first):
        check(guard, row)
    assert user.watched.report().by_vlm


def test_a_text_whose_states_are_no_numbers_fails_alone(guard: Guard) -> None:
    whole, broken = text(guard, 0), text(guard, 1)
    broken.states[1][0][4] = torch.nan
    for part in (range(5), range(5, whole.watched.width)):
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
    width = row.watched.width
    run(guard, [other, row], [range(width), range(begin, width)])
    check(guard, other)
    if begin <= frame_of(guard).before or begin == seen:
        check(guard, row)
    else:
        assert row.watched.report().failed == UNSEEN


def test_a_gap_between_parts_fails_the_text(guard: Guard) -> None:
    row = text(guard)
    run(guard, [row], [range(4)])
    run(guard, [row], [range(5, 7)])
    assert run(guard, [row], [range(7, row.watched.width)]) == [row.watched]
    assert row.watched.report().failed == UNSEEN


class Head:
    """Makes logits (b, 40) of states, and counts how many it was given."""

    def __init__(self) -> None:
        self.rows = 0
        self.weight = torch.randn(tiny.WIDTH, 40, generator=torch.Generator().manual_seed(3))

    def __call__(self, states: Tensor) -> Tensor:
        self.rows += len(states)
        return states @ self.weight


@pytest.fixture
def verdict_guard(model) -> Guard:
    """Its one gate reads the refusal signs, and a probe."""
    gate = Gate(
        kind="intent",
        source="text",
        layers=[1],
        thresholds=[0.0],
        reads_mean=True,
        reads_probe=True,
        openings=[4, 9],
        intent_weight=2.0,
        verdict_weight=0.5,
    )
    frame = FRAMES["probe"]
    return tiny.guard(model, [gate], frame=frame, layers=list(LAYERS), reference="anchor")


@pytest.mark.parametrize("cut", range(1, WIDTH + 2))
def test_the_verdict_is_on_the_last_token_of_the_text(verdict_guard: Guard, cut: int) -> None:
    """Not on that of the probe, also where the two are computed in different passes."""
    rows, head = [text(verdict_guard, seed) for seed in range(2)], Head()
    width = rows[0].watched.width
    generator = torch.Generator().manual_seed(8)
    outs = torch.randn(2, width, tiny.WIDTH, generator=generator).unbind()
    for part in (range(cut), range(cut, width)):
        step = visited(verdict_guard, rows, [part, part])
        states = torch.cat([out[part.start : part.stop] for out in outs])
        step.read_states(states, head)
        last = states.view(2, len(part), -1)[:, -1]
        step.read_logits(last, last @ head.weight)
        ended = step.finish()
    assert ended == [row.watched for row in rows] and head.rows == 2
    vector = verdict_guard.tensors["gate.0"][0].double()
    for row, out in zip(rows, outs, strict=True):
        states = sum(half.double() for half in row.states[1])
        words = words_of(verdict_guard, WIDTH)
        seen = [states[WIDTH - 1], states[words.start : words.stop].mean(0), states[width - 1]]
        logits = (out[WIDTH - 1] @ head.weight).double()
        said = logits.log_softmax(0)[[4, 9]].logsumexp(0)
        score = torch.cat(seen) @ vector + 2 * said + 0.5 * (int(logits.argmax()) in (4, 9))
        report = row.watched.report()
        assert sum((report.scores or {})["text.0"]) == pytest.approx(float(score), abs=1e-4)
        assert row.watched.logits is None


def test_a_text_whose_logits_did_not_come_fails(verdict_guard: Guard) -> None:
    """On a rank that computes none, or where the model was not seen to run."""
    for unseen in (True, False):
        row = text(verdict_guard)
        width = row.watched.width
        step = visited(verdict_guard, [row], [range(width)])
        if not unseen:
            step.read_states(torch.zeros(width, tiny.WIDTH), lambda _: None)
        step.read_logits(torch.zeros(1, tiny.WIDTH), torch.zeros(1, 40))
        step.finish()
        assert row.watched.failed == "the logits of its text are not on this worker"
