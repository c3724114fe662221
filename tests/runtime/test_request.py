"""What a request keeps of its gates' scores."""

import pytest

from tests import tiny
from vlm_safeguard.runtime.request import Request


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_score_of_zero_leaves_the_gate_shut(per_layer):
    request = Request([tiny.gate("text", 2, per_layer=per_layer)], 4, [3, 3, 3], [0, 0, 0])
    request.latch(0, 0 if per_layer else None, [[0.0], [-0.0], [1e-30]])
    assert request.opened[0] == [[False], [False], [True]]
    assert request.fired() == [False, False, True]
    assert request.open_at(2) == [False, False, True]


def test_the_verdict_is_that_of_the_reading_that_opens_the_row():
    """Of several, the first; a row that is open by its own text keeps its own."""

    def read(scores, refused):
        one = Request([tiny.gate("text", 2)], 4, [3] * len(scores), [0] * len(scores))
        one.latch(0, None, [[score] for score in scores])
        one.refused = list(refused)
        return one

    request = read([1.0, -1.0, -1.0, -1.0], [False, True, False, True])
    others = read([2.0, -1.0, 1.0, 3.0, 2.0], [True, True, True, False, True])
    request.take_worse([0, 1, 2, 3, 3], others)
    assert request.refused == [False, True, True, False]
    assert request.fired("text") == [True, False, True, True]
    request.repeat(2)
    assert request.refused == [False, False, True, True, True, True, False, False]


def test_the_verdict_of_a_canonical_form_stays_beside_that_of_the_last_turn():
    for own, other, expected in ((True, False, True), (False, True, False)):
        request = Request([tiny.gate("text", 2)], 4, [3], [0], verdictless=frozenset([0]))
        request.latch(0, None, [[1.0]])
        for refused in (own, other):
            reading = request.part([0], judged=True)
            reading.latch(0, None, [[1.0]])
            reading.refused = [refused]
            request.take_worse([0], reading)
        assert request.refused == [expected]


@pytest.mark.parametrize("per_layer", [False, True])
def test_nothing_is_open_if_every_score_is_zero(per_layer):
    request = Request([tiny.gate("text", 2, 3, per_layer=per_layer)], 4, [3], [0])
    if per_layer:
        request.latch(0, 0, [[0.0]])
        request.latch(0, 1, [[0.0]])
    else:
        request.latch(0, None, [[1.5, -1.5]])  # what counts is their sum
    assert not request.any_open
