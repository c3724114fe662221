"""The gates of a guard: which are fitted, and which are kept."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from vlm_safeguard.calibration.budget import Budget
from vlm_safeguard.calibration.conformal import allowed_exceedances
from vlm_safeguard.calibration.gate_choice import fit_gates, useful_gates
from vlm_safeguard.calibration.gate_fitting import GateFit, GateName
from vlm_safeguard.calibration.recorded_states import Readings, Recorded, States

LAYERS, WIDTH = 6, 12
HARM, REFUSED_HARM, PICTURE = 0, 1, 2  # axes that the states of a kind of prompt differ along


def drawn(seed: int = 0) -> States:
    """As text: 200 harmful prompts that show harm, 200 that the model refuses and that show little
    of it, 300 harmless ones, and 60 about a picture, half of which the model refuses as text."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(760, LAYERS, WIDTH, generator=generator)
    states[:200, :, HARM] += 6
    states[200:400, :, REFUSED_HARM] += 6
    states[700:, :, PICTURE] += 6
    # Half of the ordinary prompts look like what the model refuses.
    states[400:550, :, REFUSED_HARM] += 6
    harmful = torch.arange(760) < 400
    signs = torch.zeros(760, 2)
    signs[:, 0] = torch.randn(760, generator=generator) - 6
    signs[200:400, 1] = signs[700:730, 1] = 1
    ids = tuple(str(n) for n in range(760))
    return States(ids, states, harmful, torch.arange(760) % 5, torch.ones(760).bool(), signs)


def recorded(text: States) -> Recorded:
    none = Readings(
        torch.empty(0, LAYERS, WIDTH), torch.empty(0, 2), torch.empty(0, 2, dtype=torch.long)
    )
    generator = torch.Generator().manual_seed(9)
    pairs = torch.randn(2, 20, LAYERS, WIDTH, generator=generator)
    pairs[0, ..., HARM] += 6
    directions = {n: torch.eye(WIDTH)[:2] for n in range(LAYERS)}
    about = frozenset(text.ids[700:])
    return Recorded(
        pairs, directions, [7], text, none, {"blank": replace(text, signs=None)}, frozenset(), about
    )


def test_what_the_model_refuses_as_text_opens_a_gate_of_its_own() -> None:
    """The text gate can't tell the refused prompts from harmless ones. The verdict can, but it
    would stop questions about a picture, too: the gate on refused texts confirms it."""
    found = recorded(drawn())
    fits = fit_gates(found, Budget())
    assert list(fits) == ["text", "refused", "vlm"]
    assert fits["text"].weights[1] == 0 and fits["refused"].openings == (7,)
    assert fits["text"].unseen_rates[0] < 0.75
    fresh = drawn(seed=1)
    opened = fits["refused"].scores(fresh.states, fresh.signs) > 0
    assert opened[200:400].double().mean() > 0.95  # refused as text
    assert not opened[:200].any() and not opened[400:700].any()  # not refused
    assert opened[700:].double().mean() < 0.1  # about a picture, refused or not
    together = found.found_together(fits)
    assert together.shape == (400, 3)
    assert together[:200, 1].eq(-math.inf).all() and (together[200:, 1] > 0).double().mean() > 0.95


@pytest.mark.parametrize("refused", [range(700, 700), range(700, 705)])
def test_without_enough_refused_questions_about_a_picture_the_text_gate_weighs_the_verdict(
    refused: range,
) -> None:
    text = drawn()
    assert text.signs is not None
    text.signs[700:, 1] = 0
    text.signs[list(refused), 1] = 1
    fits = fit_gates(recorded(text), Budget())
    assert list(fits) == ["text", "vlm"]
    assert fits["text"].weights[1] > 0 and fits["text"].unseen_rates[0] > 0.85


def test_without_openings_no_gate_reads_refusal_signs() -> None:
    found = recorded(replace(drawn(), signs=None))
    fits = fit_gates(replace(found, openings=[]), Budget())
    assert list(fits) == ["text", "vlm"] and fits["text"].openings == ()


@pytest.mark.parametrize(
    ("finds", "kept"),
    [((), ["text"]), (("refused",), ["text", "refused"]), (("vlm",), ["text", "vlm"])],
)
def test_of_several_gates_those_are_kept_that_find_most(
    finds: tuple[GateName, ...], kept: list[str]
) -> None:
    """Each opens on as many harmless questions, others than the first does."""
    names: list[GateName] = ["text", "refused", "vlm"]
    harmless = torch.stack([torch.linspace(-2, 1, 1000).roll(300 * n) for n in range(3)], 1)
    harmful = torch.full((100, 3), -9.0)
    harmful[:60, 0] = 5.0
    for name in finds:
        harmful[60:80, names.index(name)] = 5.0
    fits = {name: GateFit((0,), torch.ones(1, 1), 0.0, spread=2.0) for name in names}
    gates = useful_gates(fits, harmless, 0.02, harmful)
    assert list(gates) == kept
    columns = [names.index(name) for name in gates]
    cuts = {gate.threshold / 2.0 for gate in gates.values()}
    assert len(cuts) == 1
    above = (harmless[:, columns] > cuts.pop() + 1e-6).any(1)
    assert int(above.sum()) == allowed_exceedances(1000, 0.02)
