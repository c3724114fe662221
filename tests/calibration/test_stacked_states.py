"""States in parts: read one layer at a time, with the same numbers as from one tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlm_safeguard.calibration.budget import Budget
from vlm_safeguard.calibration.calibrate import _separability
from vlm_safeguard.calibration.gate_candidates import Kind
from vlm_safeguard.calibration.gate_choice import fit_gates
from vlm_safeguard.calibration.gate_fitting import fit_gate
from vlm_safeguard.calibration.recorded_states import Readings, Recorded, States
from vlm_safeguard.calibration.stacked_states import StackedStates
from vlm_safeguard.evaluation.studies.gate_forms import paper_gate

LAYERS, WIDTH = 40, 128


def drawn(count: int, width: int, seed: int, layers: int = LAYERS) -> Tensor:
    """States (count, layers, width), the first half of them apart from the others."""
    states = torch.randn(count, layers, width, generator=torch.Generator().manual_seed(seed))
    states[: count // 2, :, 3] += 2
    return states


def labelled(states: Tensor) -> States:
    count = len(states)
    harmful, all_of_them = torch.arange(count) < count // 2, torch.ones(count, dtype=torch.bool)
    ids = tuple(map(str, range(count)))
    return States(ids, states, harmful, torch.arange(count) % 5, all_of_them)


def recorded() -> Recorded:
    """60 prompts as text with means, half of them harmful; 20 of each label the model refuses."""
    text = labelled(drawn(60, 2 * WIDTH, 0))
    signs = torch.zeros(60, 2)
    signs[10:50, 1] = 1
    none_twice = torch.tensor([[n, n] for n in range(10)])
    return Recorded(
        drawn(10, 2 * WIDTH, 1).view(2, 5, LAYERS, 2 * WIDTH),
        {n: torch.eye(WIDTH)[[3, 0]] for n in range(LAYERS)},
        [7],
        replace(text, signs=signs),
        Readings(drawn(10, 2 * WIDTH, 2), torch.zeros(10, 2), none_twice),
        {"blank": labelled(drawn(30, WIDTH, 3))},
        frozenset(),
    )


class Allocations(TorchDispatchMode):
    """The most bytes of a tensor that was made meanwhile; views are none."""

    most = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], _: object, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        old = {one.untyped_storage().data_ptr() for one in tree_leaves(args) if is_tensor(one)}
        for one in filter(is_tensor, tree_leaves(found)):
            if one.untyped_storage().data_ptr() not in old:
                self.most = max(self.most, one.untyped_storage().nbytes())
        return found


def is_tensor(found: object) -> bool:
    return isinstance(found, Tensor)


def test_no_more_than_a_layer_of_the_recorded_states_is_copied() -> None:
    made = recorded()
    with Allocations() as during:
        fits = fit_gates(made, Budget())
        for fit in (*fits.texts, fits.vlm):
            made.text.scores(fit)
        _separability(made.text, made.pictured, made.directions)
        paper_gate("vlm", "blank", made, made.text)
    without_means = (60 + 10 + 10) * WIDTH * 4
    assert without_means <= during.most < 2 * without_means


def test_parts_are_read_as_if_they_were_one_tensor() -> None:
    whole = drawn(12, 6, 0, layers=3)
    mask, again = torch.arange(12) % 3 != 1, torch.arange(8) % 2 == 0
    stacked = StackedStates.of(whole[:5], StackedStates.of(whole[5:5], whole[5:]))
    for found, expected in (
        (stacked, whole),
        (stacked.chosen(mask), whole[mask]),
        (stacked.chosen(mask).chosen(again), whole[mask][again]),
        (stacked.narrowed(4).chosen(~mask), whole[~mask][..., :4]),
    ):
        assert (len(found), found.width) == (len(expected), expected.shape[2])
        for layer in range(3):
            assert torch.equal(found.layer(layer), expected[:, layer])
            assert torch.equal(found.layer(layer, slice(1, 3)), expected[:, layer, 1:3])


@pytest.mark.parametrize("kind", ["margin", "components"])
def test_a_fit_to_parts_is_that_to_one_tensor(kind: Kind) -> None:
    states = [drawn(80, 24, seed, layers=6) for seed in (0, 1)]
    label = (torch.arange(80) < 40).repeat(2)
    parts, whole = StackedStates.of(*states), torch.cat(states)
    signs = torch.randn(80, 2, generator=torch.Generator().manual_seed(2))
    fold = torch.arange(80) % 4
    fits = [
        fit_gate(
            every[0],
            every[1],
            fold,
            fold,
            {n: torch.eye(12)[[3, 0]] for n in range(6)},
            0.05,
            kinds=[kind],
            signs=(signs + 1, signs.flip(0)),
            openings=[7],
        )
        for every in (
            (whole[label], whole[~label]),
            (parts.chosen(label), parts.chosen(~label)),
        )
    ]
    of_one, of_parts = fits
    assert torch.equal(of_one.vectors, of_parts.vectors)
    for found, expected in zip(of_parts.unseen, of_one.unseen, strict=True):
        assert torch.equal(found, expected)
    one, other = ((f.layers, f.threshold, f.weights, f.spread, f.judged) for f in fits)
    assert one == other
    both = torch.cat([signs, signs])
    assert torch.equal(of_one.scores(whole, both), of_parts.scores(parts, both))
