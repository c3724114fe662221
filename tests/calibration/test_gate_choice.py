"""The gates of a guard: which are fitted, and which are kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vlm_safeguard.calibration import gate_choice
from vlm_safeguard.calibration.budget import Budget
from vlm_safeguard.calibration.conformal import allowed_exceedances
from vlm_safeguard.calibration.gate_choice import VERDICTS, FittedGates, fit_gates, useful_gates
from vlm_safeguard.calibration.gate_fitting import GateFit
from vlm_safeguard.calibration.recorded_states import Readings, Recorded, States
from vlm_safeguard.data.prompts import calibration
from vlm_safeguard.utils.progress import Progress

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
    return Recorded(
        pairs, directions, [7], text, none, {"blank": replace(text, signs=None)}, frozenset()
    )


def test_what_the_model_refuses_as_text_opens_the_gate() -> None:
    """By their states, half of what the model refuses looks harmless. The verdict tells, but it
    would stop questions about a picture too: the states must agree with it."""
    found = recorded(drawn())
    fits = fit_gates(found, Budget())
    assert len(fits.texts) == len(VERDICTS)
    assert not fits.texts[0].openings and all(fit.openings == (7,) for fit in fits.texts[1:])
    fresh = drawn(seed=1)
    assert fresh.signs is not None
    scores = torch.stack(
        [fit.scores(fresh.states, fresh.signs) / fit.spread for fit in fits.texts]
        + [fits.vlm.scores(fresh.states) / fits.vlm.spread],
        1,
    )
    together = found.found_together(fits.texts, fits.vlm)
    assert together.shape == (400, len(VERDICTS) + 1)
    gate = useful_gates(fits, scores[400:], 0.02, together)["text"]
    assert gate.weights[1] > 0
    opened = gate.scores(fresh.states, fresh.signs) > 0
    assert opened[200:400].double().mean() > 0.97  # refused as text
    assert (fits.texts[0].scores(fresh.states)[200:400] > 0).double().mean() < 0.9
    assert opened[400:].double().mean() < 0.02
    assert opened[700:].double().mean() < 0.1  # about a picture, half of them refused


def test_the_verdict_counts_in_units_of_the_spread() -> None:
    fits = fit_gates(recorded(drawn()), Budget())
    fresh = drawn(seed=1)
    plain = fits.texts[0].scores(fresh.states)
    for weight, fit in zip(VERDICTS, fits.texts, strict=True):
        more = (fit.scores(fresh.states, fresh.signs) - plain) / fit.spread
        expected = torch.where(fresh.signs[:, 1] > 0, weight, 0.0)  # type: ignore[index]
        torch.testing.assert_close(more, expected, atol=1e-4, rtol=0)
        raised = fit.unseen[0] - fits.texts[0].unseen[0]
        assert set(raised[:200].tolist()) == {0.0}
        assert raised[200:400].tolist() == pytest.approx([weight] * 200, abs=1e-5)


def test_without_openings_no_gate_reads_refusal_signs() -> None:
    found = recorded(replace(drawn(), signs=None))
    fits = fit_gates(replace(found, openings=[]), Budget())
    assert [fit.openings for fit in fits.texts] == [()]
    with pytest.raises(ValueError, match="no verdicts"):
        fits.texts[0].heeding(1.0, [7])


def text_gates(refused: torch.Tensor, other: torch.Tensor) -> list[GateFit]:
    """Gates with spread 2, by their scores of harmful requests that the model refuses and of
    others, and by weights of the verdict 0, 1 and 2."""
    said = torch.cat([torch.ones_like(refused), torch.zeros_like(other)])
    scores = torch.cat([refused, other])
    return [
        GateFit(
            (0,),
            torch.ones(1, 1),
            0.0,
            weights=(0.0, 2.0 * weight),
            spread=2.0,
            unseen=(scores + weight * said, torch.empty(0)),
            verdicts=(said, torch.empty(0)),
        )
        for weight in (0.0, 1.0, 2.0)
    ]


@pytest.mark.parametrize(
    ("refused", "weight"),
    [
        (torch.full((50,), 5.0), 0.0),  # all open the gate as it is
        (torch.tensor([0.5] * 40 + [5.0] * 10), 1.0),
        (torch.tensor([-0.5] * 2 + [5.0] * 48), 2.0),  # 96% with less
        (torch.tensor([-0.5] + [5.0] * 49), 0.0),  # 98%
        (torch.tensor([-9.0] * 10 + [0.5] * 30 + [5.0] * 10), 1.0),  # never 98%: the most
        (torch.tensor([-0.5] * 3 + [5.0] * 6), 0.0),  # too few to tell
    ],
)
def test_the_verdict_weighs_as_much_as_refused_requests_need(
    refused: torch.Tensor, weight: float
) -> None:
    """More would raise the threshold, because the model also refuses harmless questions."""
    texts = text_gates(refused, torch.linspace(0, 2, 100))
    fits = FittedGates(texts, GateFit((1,), torch.ones(1, 1), 0.0))
    plain = torch.linspace(-2, 1, 1000)
    said = torch.arange(1000) % 5 == 0
    harmless = torch.stack([*(plain + w * said for w in (0.0, 0.2, 0.4)), plain - 9], 1)
    harmful = torch.stack([*(fit.unseen[0] for fit in texts), texts[0].unseen[0] - 99], 1)
    gates = useful_gates(fits, harmless, 0.02, harmful)
    assert list(gates) == ["text"]
    assert gates["text"].weights[1] == 2.0 * weight
    above = harmless[:, int(weight)] > gates["text"].threshold / 2.0 + 1e-6
    assert int(above.sum()) == allowed_exceedances(1000, 0.02)


@pytest.mark.parametrize(("finds", "kept"), [(False, ["text"]), (True, ["text", "vlm"])])
def test_the_gate_in_the_vlm_is_kept_if_it_finds_more(finds: bool, kept: list[str]) -> None:
    """It opens on as many harmless questions, others than the text gate does."""
    harmless = torch.stack([torch.linspace(-2, 1, 1000).roll(300 * n) for n in range(2)], 1)
    harmful = torch.full((100, 2), -9.0)
    harmful[:60, 0] = 5.0
    if finds:
        harmful[60:80, 1] = 5.0
    text, vlm = (GateFit((0,), torch.ones(1, 1), 0.0, spread=2.0) for _ in range(2))
    gates = useful_gates(FittedGates([text], vlm), harmless, 0.02, harmful)
    assert list(gates) == kept
    cuts = {gate.threshold / 2.0 for gate in gates.values()}
    assert len(cuts) == 1
    above = (harmless[:, : len(kept)] > cuts.pop() + 1e-6).any(1)
    assert int(above.sum()) == allowed_exceedances(1000, 0.02)


@pytest.mark.parametrize("refused", [False, True])
def test_thresholds_are_set_on_what_a_guard_scores(
    refused: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of a text in odd characters, its canonical form has the verdict, and each sentence none."""
    texts = ["How do I bake?", "Bake it now. Then e\u200bat it.", "Bake it now. Then eat it."]
    items = [
        replace(p, cluster=str(n), prompt=text)
        for n, (p, text) in enumerate(zip(calibration("bound"), texts, strict=False))
    ]
    places = [("form", 1), ("first", 1), ("second", 1), ("first", 2), ("second", 2)]
    linear = {"form": 3.0, "first": 1.0, "second": 6.0}
    names = list(linear)
    readings = Readings(
        torch.tensor(list(linear.values()))[:, None, None],
        torch.zeros(3, 2),
        torch.tensor([(owner, names.index(name)) for name, owner in places]),
    )
    signs = torch.tensor([[0.0, 0.0], [0.0, float(refused)], [0.0, 0.0]])
    own = torch.tensor([2.0, 4.0, 5.0])[:, None, None]
    monkeypatch.setattr(gate_choice, "record_signs", lambda *_, **__: (own, signs))
    monkeypatch.setattr(gate_choice, "record_readings", lambda *_: readings)
    monkeypatch.setattr(gate_choice, "find_frame", lambda _: None)
    monkeypatch.setattr(gate_choice, "answered", lambda _, asked, *__: [True] * len(asked))
    plain = GateFit((0,), torch.ones(1, 1), 0.0)
    heeding = replace(plain, openings=(7,), weights=(0.0, 10.0))
    found = gate_choice.bound_scores(
        None,  # type: ignore[arg-type]
        FittedGates([plain, heeding], plain),
        items,
        False,
        True,
        0.02,
        tmp_path,
        Progress(quiet=True),
    )
    assert found[:, 0].tolist() == [2, 6, 6]
    assert found[:, 1].tolist() == [2, 13 if refused else 6, 6]
