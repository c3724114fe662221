"""Every function of the method against float64 references written from the formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlm_safeguard import method

SEEDS = st.integers(0, 10_000)


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthonormal(seed, rank, width):
    square = randn(seed, width, width).double()
    return torch.linalg.qr(square)[0][:rank].float()


def anchors(seed, pairs=12, width=9):
    harmless = randn(seed, pairs, width)
    return harmless + randn(seed + 1, 1, width) + randn(seed + 2, pairs, width), harmless


def wide(tensor):
    return tensor.double().numpy()


# -- directions --------------------------------------------------------------------------------


@given(SEEDS, st.integers(1, 9))
def test_directions_are_the_oriented_top_right_singular_vectors(seed, rank):
    harmful, harmless = anchors(seed)
    found = wide(method.safety_directions(harmful, harmless, rank))
    differences = wide(harmful) - wide(harmless)
    expected = np.linalg.svd(differences)[2][:rank]
    growth = differences.mean(0) @ expected.T
    expected = expected * np.where(growth < 0, -1, 1)[:, None]
    clear = np.abs(growth) > 1e-4  # where the sign is not a matter of rounding
    np.testing.assert_allclose(found[clear], expected[clear], atol=2e-3)
    np.testing.assert_allclose(found @ found.T, np.eye(rank), atol=1e-5)
    assert (differences.mean(0) @ found.T > -1e-6).all()


def test_directions_follow_the_mean_difference_because_nothing_is_centred():
    noise = randn(0, 100, 16) * torch.linspace(0.1, 2, 16)
    mean = torch.nn.functional.normalize(randn(1, 16), dim=0)
    harmful, harmless = noise + 4 * mean, torch.zeros(100, 16)
    raw = method.safety_directions(harmful, harmless, 1)[0]
    centred = method.safety_directions(harmful - harmful.mean(0), harmless, 1)[0]
    assert float(raw @ mean) > 0.9
    assert abs(float(centred @ mean)) < 0.5


def test_a_row_without_a_mean_is_kept():
    harmful = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    found = method.safety_directions(harmful, torch.zeros(2, 2), 2)
    assert torch.allclose(found @ found.T, torch.eye(2))


@pytest.mark.parametrize(
    ("harmful", "harmless", "rank"),
    [
        (torch.ones(3, 4), torch.ones(2, 4), 1),
        (torch.ones(4), torch.ones(4), 1),
        (torch.ones(3, 4), torch.zeros(3, 4), 0),
        (torch.ones(3, 4), torch.zeros(3, 4), 4),
        (torch.full((3, 4), torch.nan), torch.zeros(3, 4), 1),
        (torch.full((3, 4), torch.inf), torch.zeros(3, 4), 1),
    ],
    ids=["pairs", "one-dimensional", "rank-0", "rank-too-high", "nan", "inf"],
)
def test_bad_anchors_are_refused(harmful, harmless, rank):
    with pytest.raises(ValueError):
        method.safety_directions(harmful, harmless, rank)


# -- gate --------------------------------------------------------------------------------------


@given(SEEDS)
def test_scores_and_gate(seed):
    states, vectors, thresholds = randn(seed, 4, 3, 8), randn(seed + 1, 3, 8), randn(seed + 2, 3)
    expected = (wide(states) * wide(vectors)).sum(-1) - wide(thresholds)
    scores = method.gate_scores(states, vectors, thresholds)
    np.testing.assert_allclose(wide(scores), expected, atol=1e-4)
    flipped = method.gate_scores(states, -vectors, 0 * thresholds)
    assert torch.equal(flipped, -method.gate_scores(states, vectors, 0 * thresholds))


# -- what is done ------------------------------------------------------------------------------


def erase(h, rows):
    return method.set_coordinates(h, rows, torch.zeros(len(h), len(rows)))


def restore(h, rows, t, alpha):
    return method.set_coordinates(h, rows, method.restored(t, alpha))


def add(h, rows, c, alpha):
    return method.shift(h, method.pull(c, rows, alpha))


@given(SEEDS, st.integers(1, 8), st.floats(-2, 2))
def test_steering_is_what_the_formulas_say(seed, rank, alpha):
    h, rows = randn(seed, 2, 3, 8), orthonormal(seed + 1, rank, 8)
    t = randn(seed + 2, 2, rank)
    h64, v64, t64 = wide(h), wide(rows), wide(t)[:, None]
    expected = {
        "coordinates": h64 @ v64.T,
        "erase": h64 - h64 @ v64.T @ v64,
        "add": h64 + alpha * t64 @ v64,
        "restore": h64 - h64 @ v64.T @ v64 + (1 + alpha) * t64 @ v64,
    }
    found = {
        "coordinates": method.coordinates(h, rows),
        "erase": erase(h, rows),
        "add": add(h, rows, t, alpha),
        "restore": restore(h, rows, t, alpha),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(wide(found[name]), value, atol=1e-5, err_msg=name)
    step = h[:, 1]  # one column, as in a decoding step
    for name, steered in {
        "erase": erase(step, rows),
        "add": add(step, rows, t, alpha),
        "restore": restore(step, rows, t, alpha),
    }.items():
        np.testing.assert_allclose(wide(steered), expected[name][:, 1], atol=1e-5, err_msg=name)


@given(SEEDS, st.integers(1, 8))
def test_the_projection_is_idempotent_and_blind_to_signs(seed, rank):
    h, rows = randn(seed, 2, 3, 8), orthonormal(seed + 1, rank, 8)
    t = randn(seed + 2, 2, rank)
    signs = torch.where(randn(seed + 3, rank) < 0, -1.0, 1.0)
    erased = erase(h, rows)
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(erase(erased, rows), erased, **close)
    torch.testing.assert_close(method.coordinates(erased, rows), torch.zeros(2, 3, rank), **close)
    flipped = signs[:, None] * rows
    torch.testing.assert_close(erase(h, flipped), erased, **close)
    restored = restore(h, rows, t, 0.5)
    torch.testing.assert_close(restore(h, flipped, signs * t, 0.5), restored, **close)
    torch.testing.assert_close(add(h, flipped, signs * t, 0.5), add(h, rows, t, 0.5))


@given(SEEDS, st.integers(1, 8))
def test_restoring_ones_own_coordinates_changes_nothing(seed, rank):
    h, rows = randn(seed, 3, 1, 8), orthonormal(seed + 1, rank, 8)
    own = method.coordinates(h, rows)[:, 0]
    torch.testing.assert_close(restore(h, rows, own, 0.0), h, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["erase", "add", "restore"])
def test_half_precision_is_only_rounded_at_the_end(name, dtype):
    h, rows, t = 20 * randn(0, 2, 3, 64), orthonormal(1, 8, 64), 20 * randn(2, 2, 8)
    more = () if name == "erase" else (t, 0.7)
    found = {"erase": erase, "add": add, "restore": restore}[name](h.to(dtype), rows, *more)
    exact = {"erase": erase, "add": add, "restore": restore}[name](h.to(dtype).float(), rows, *more)
    assert found.dtype == dtype
    assert torch.equal(found, exact.to(dtype))
