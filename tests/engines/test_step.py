"""One step over a flattened batch does to each request what an attached guard does to its row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from vlm_safeguard.engines.vllm.messages import Role
from vlm_safeguard.engines.vllm.step import BatchRow, Step, parts_of
from vlm_safeguard.engines.vllm.watched import Texts, Watched
from vlm_safeguard.errors import GuardRuntimeError
from vlm_safeguard.guard import Guard
from vlm_safeguard.runtime.gate import Gates
from vlm_safeguard.runtime.request import Request
from vlm_safeguard.runtime.steering import Steerer

LAYERS = range(tiny.LAYERS)
WIDTHS = (5, 3, 7)  # prompt tokens of the requests of a batch


def watched(guard: Guard, width: int, name: str = "a") -> Watched:
    request = Request(guard.config.gates, width, [width - 1], [0])
    return Watched(name, Role("", "", 0, 0, True, False, False), request, width)


def rows_of(requests: list[Watched], columns: list[range]) -> list[BatchRow]:
    starts = [0]
    for part in columns:
        starts.append(starts[-1] + len(part))
    return [
        BatchRow(one, number, starts[number], columns[number])
        for number, one in enumerate(requests)
    ]


def step_of(guard: Guard, rows: list[BatchRow]) -> Step:
    steerer = Steerer(guard.config.steering, guard.tensors, False)
    gates, frame = Gates(guard.config.gates, guard.tensors), guard.config.frame
    return Step(rows, list(LAYERS), gates, steerer, len(frame.probe) if frame else 0)


def streams(seed: int, tokens: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randn(tokens, tiny.WIDTH, generator=generator) for _ in range(2))
        for _ in LAYERS
    ]


@pytest.fixture
def guard(model) -> Guard:
    return tiny.guard(
        model, [tiny.gate("vlm", 1)], layers=list(LAYERS), rank=3, reference="anchor", tokens=2
    )


def test_each_request_is_scored_and_steered_by_itself(guard: Guard) -> None:
    requests = [watched(guard, width, str(width)) for width in WIDTHS]
    rows = rows_of(requests, [range(width) for width in WIDTHS])
    step, layers = step_of(guard, rows), streams(0, sum(WIDTHS))
    before = [hidden + residual for hidden, residual in layers]
    for layer, output in enumerate(layers):
        step.visit(layer, *output)
    assert step.finish() == requests
    vector = guard.tensors["gate.0"][0]
    fired = []
    for row, request in zip(rows, requests, strict=True):
        q = row.start + request.width - 1
        score = float(before[1][q] @ vector)
        assert request.report().scores == {"vlm.0": [pytest.approx(score, abs=1e-4)]}
        fired.append(score > 0)
        for layer, (hidden, residual) in enumerate(layers):
            after, expected = hidden + residual, before[layer].clone()
            if score > 0 and layer >= 1:  # the gate is not decided below
                rows_ = guard.tensors[f"directions.{layer}"]
                own, target = expected[q] @ rows_.T, 1.5 * guard.tensors[f"anchor.{layer}"]
                expected[q] += (target - own) @ rows_
            part = slice(row.start, row.start + request.width)
            assert torch.allclose(after[part], expected[part], atol=1e-4)
    assert {True, False} == set(fired)


def test_a_latched_dose_reaches_the_guarded_tokens_and_no_more(guard: Guard) -> None:
    opened = tiny.with_thresholds(guard, [[-1e9]])
    requests = [watched(opened, 4)]
    changed = []
    for columns in (range(3), range(3, 4), range(4, 5), range(5, 6), range(2, 6)):
        step, layers = step_of(opened, rows_of(requests, [columns])), streams(1, len(columns))
        before = [hidden + residual for hidden, residual in layers]
        for layer, output in enumerate(layers):
            step.visit(layer, *output)
        step.finish()
        moved = [
            not torch.allclose(one, sum(pair), atol=1e-5)
            for one, pair in zip(before[3], zip(*layers[3], strict=True), strict=True)
        ]
        changed.append(moved)
    # A chunk, the last prompt token, a guarded token, a later one; then all of it computed again.
    assert changed == [[False] * 3, [True], [True], [False], [False, True, True, False]]


def test_each_token_gets_what_refusals_have_there(model: Any) -> None:
    """Also where a prompt and its answer are computed again in one pass."""
    steering = {"layers": list(LAYERS), "reference": "anchor", "tokens": 3, "later": "refusal"}
    made = tiny.guard(model, [tiny.gate("vlm", 1, threshold=-1e9)], rank=3, **steering)
    request = watched(made, 4)
    for columns in (range(4), range(4, 5), range(5, 6), range(2, 7)):
        step, layers = step_of(made, rows_of([request], [columns])), streams(1, len(columns))
        before = [hidden + residual for hidden, residual in layers]
        for layer, output in enumerate(layers):
            step.visit(layer, *output)
        step.finish()
        rows = made.tensors["directions.3"]
        targets = {3: made.tensors["anchor.3"]}
        targets |= {4 + n: row for n, row in enumerate(made.tensors["refusal.3"])}
        for n, column in enumerate(columns):
            expected = before[3][n].clone()
            if column in targets:
                expected += (1.5 * targets[column] - expected @ rows.T) @ rows
            assert torch.allclose(sum(layers[3])[n], expected, atol=1e-4)


def test_a_stream_in_one_tensor_is_steered_too(guard: Guard) -> None:
    opened = tiny.with_thresholds(guard, [[-1e9]])
    outputs = []
    for split in (True, False):
        step = step_of(opened, rows_of([watched(opened, 4)], [range(4)]))
        layers = streams(2, 4)
        found = [pair if split else (pair[0] + pair[1]).clone() for pair in layers]
        for layer, output in enumerate(found):
            step.visit(layer, *parts_of(output))
        outputs.append([sum(output) if split else output for output in found])
    for one, other in zip(*outputs, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_layer_that_did_not_run_stops_the_step(guard: Guard) -> None:
    step = step_of(guard, rows_of([watched(guard, 4)], [range(4)]))
    for layer, output in enumerate(streams(0, 4)[:-1]):
        step.visit(layer, *output)
    with pytest.raises(GuardRuntimeError, match="5 of 6 guarded layers ran"):
        step.finish()


def test_a_layer_that_returns_something_else_is_not_supported() -> None:
    for output in (torch.zeros(4), (torch.zeros(4, 8), torch.zeros(4, 9)), "x"):
        with pytest.raises(GuardRuntimeError, match="not supported"):
            parts_of(output)


def test_a_prompt_whose_last_token_was_not_computed_fails(guard: Guard) -> None:
    request = watched(guard, 4)
    step = step_of(guard, rows_of([request], [range(4, 5)]))
    for layer, output in enumerate(streams(0, 1)):
        step.visit(layer, *output)
    step.finish()
    assert "not computed under guard" in request.report().failed


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["state", "logits"])
@pytest.mark.parametrize("token", [0, 1, 2])
def test_a_request_whose_numbers_are_not_finite_fails_alone(
    guard: Guard, bad: float, where: str, token: int
) -> None:
    """At its prompt's end, at a steered token (the guard steers two), and at a later one, where
    only the state is looked at."""
    opened = tiny.with_thresholds(guard, [[-1e9]])
    whole, broken = watched(opened, 3, "whole"), watched(opened, 4, "broken")
    passes = ((range(3), range(4)), (range(3, 4), range(4, 5)), (range(4, 5), range(5, 6)))
    for number, columns in enumerate(passes[: token + 1]):
        step = step_of(opened, rows_of([whole, broken], [*columns]))
        for layer, output in enumerate(streams(0, sum(map(len, columns)))):
            step.visit(layer, *output)
        found = {"state": torch.zeros(2, 8), "logits": torch.zeros(2, 9)}
        if number == token:
            found[where][1, 5] = bad
        step.read_logits(found["state"], found["logits"])
        step.finish()
    assert not whole.failed
    missed = where == "logits" and token == 2
    assert broken.failed == ("" if missed else "its last state or its logits are NaN or Inf")


@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize("bad", range(4))
def test_logits_are_read_where_a_prompt_ends(guard: Guard, bad: int, place: int) -> None:
    """Of four requests the one at ``place`` has ended its prompt before, and its gate is shut."""
    shut = tiny.with_thresholds(guard, [[1e9]])
    before = watched(shut, 3, "before")
    step = step_of(shut, rows_of([before], [range(3)]))
    for layer, output in enumerate(streams(0, 3)):
        step.visit(layer, *output)
    step.read_logits(torch.zeros(1, 8), torch.zeros(1, 9))
    step.finish()
    requests = [watched(shut, 3, name) for name in ("first", "second", "third")]
    columns = [range(3)] * 3
    requests.insert(place, before)
    columns.insert(place, range(3, 4))
    step = step_of(shut, rows_of(requests, columns))
    for layer, output in enumerate(streams(1, 10)):
        step.visit(layer, *output)
    logits = torch.zeros(4, 9)
    logits[bad, 2] = torch.nan
    step.read_logits(torch.zeros(4, 8), logits)
    step.finish()
    assert [bool(request.failed) for request in requests] == [
        n == bad and n != place for n in range(4)
    ]


def test_logits_of_other_rows_are_refused(guard: Guard) -> None:
    step = step_of(guard, rows_of([watched(guard, 3, "a"), watched(guard, 3, "b")], [range(3)] * 2))
    with pytest.raises(GuardRuntimeError, match="1 rows of logits at the head for 2 rows"):
        step.read_logits(torch.zeros(2, 8), torch.zeros(1, 9))


def test_texts_are_taken_once_and_only_whole(guard: Guard) -> None:
    texts = Texts()
    text = watched(guard, 4, "a#text0")
    text.role = Role("", "a", 0, 4, True, False, False)
    texts.keep(text)
    with pytest.raises(GuardRuntimeError, match="not read"):
        texts.take("a", 2)
    texts.keep(text)
    assert texts.take("a", 1) is text.request
    with pytest.raises(GuardRuntimeError, match="not read"):
        texts.take("a", 1)
    assert not len(texts)
