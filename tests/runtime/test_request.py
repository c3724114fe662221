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


@pytest.mark.parametrize("per_layer", [False, True])
def test_nothing_is_open_if_every_score_is_zero(per_layer):
    request = Request([tiny.gate("text", 2, 3, per_layer=per_layer)], 4, [3], [0])
    if per_layer:
        request.latch(0, 0, [[0.0]])
        request.latch(0, 1, [[0.0]])
    else:
        request.latch(0, None, [[1.5, -1.5]])  # what counts is their sum
    assert not request.any_open
