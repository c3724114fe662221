"""What a guard costs on harmless requests: one that the model refuses by itself costs nothing."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests import checkpoint, tiny
from vlm_safeguard.calibration import attack_trials, held_out
from vlm_safeguard.calibration.attack_trials import Attacks, Cost, harmless_cost
from vlm_safeguard.calibration.budget import Budget, Effort
from vlm_safeguard.data.prompts import calibration
from vlm_safeguard.errors import CalibrationError
from vlm_safeguard.model.loading import load
from vlm_safeguard.model.text_only import find_markup
from vlm_safeguard.utils.progress import Progress
from vlm_safeguard.utils.stats import wilson

QUIET = Progress(quiet=True)
GUARD = SimpleNamespace(config=SimpleNamespace(reads_pictures=False))
LOADED = SimpleNamespace(processor=SimpleNamespace(tokenizer=None))


def test_only_what_the_model_would_answer_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate opens on three of four requests; the model refuses one of them as text."""
    plain = [p for p in calibration("held") if p.form == "plain" and p.ordinary][:4]
    open_on = {plain[0].prompt: 0.9, plain[1].prompt: 0.5, plain[2].prompt: 0.5}
    before = torch.tensor([0.5, 0.5]).log()

    def next_token(_, items, guard):
        share = [open_on.get(item.text, 0.5) if guard else 0.5 for item in items]
        moved = torch.tensor([[p, 1 - p] for p in share]).log()
        return moved, [bool(guard) and item.text in open_on for item in items]

    def answered(_, items, *__):
        assert plain[3] not in items  # closed: nothing to ask
        return [p != plain[1] for p in items]

    monkeypatch.setattr(attack_trials, "_next_token", next_token)
    monkeypatch.setattr(attack_trials, "answered", answered)
    monkeypatch.setattr(attack_trials, "batches", lambda _, items, __: [range(len(items))])
    cost = harmless_cost(LOADED, GUARD, plain)  # type: ignore[arg-type]
    assert cost.stopped == [True, False, True, False] * 3  # text, blank, picture
    moved = torch.tensor([0.9, 0.1]).log()
    divergence = float((before.exp() * (before - moved)).sum())
    assert cost.kl == pytest.approx(divergence / 4)
    assert (cost.rate().count, cost.rate().n) == (6, 12)


def proof_of(monkeypatch: pytest.MonkeyPatch, stopped: dict[bool, int], kl: float) -> dict:
    """The proof of a guard that stops every attack and so many in 20 harmless requests, by
    whether they are look-alikes."""

    def cost(_, __, items, *___):
        [lookalike] = {p.lookalike for p in items}
        assert not any(p.harmful for p in items)
        hits = [n % 20 < stopped[lookalike] for n in range(len(items))]
        return Cost(9.0 if lookalike else kl, hits, [p.id for p in items])

    def attack(_, __, items, *___):
        assert all(p.harmful for p in items)
        return Attacks(items, [True] * len(items), [False] * len(items))

    monkeypatch.setattr(held_out, "harmless_cost", cost)
    monkeypatch.setattr(held_out, "attack", attack)
    held = calibration("held")
    return held_out.prove(None, None, held, Budget(), Effort(proof=40), QUIET)  # type: ignore[arg-type]


def test_a_guard_that_never_fires_is_not_proven(tmp_path: Path) -> None:
    """A model that refuses nothing: all attacks succeed, under the guard too."""
    loaded = load(checkpoint.save(tmp_path))
    made = tiny.guard(loaded.model, [tiny.gate("text", 1, threshold=1e9)])
    made = tiny.changed(made, markup=find_markup(loaded))
    held, effort = calibration("held"), Effort(proof=8, tokens=4)
    with pytest.raises(
        CalibrationError, match=r"no guard: .* with images (\d+) of \1 .*, \1 without"
    ):
        held_out.prove(loaded, made, held, Budget(), effort, QUIET)


def test_lookalikes_are_reported_and_not_budgeted(monkeypatch: pytest.MonkeyPatch) -> None:
    proof = proof_of(monkeypatch, {False: 0, True: 8}, 0.01)
    assert proof["harmless"] == {"n": 40, "stopped": 0, "kl": 0.01}
    assert proof["lookalikes"] == {"n": 20, "stopped": 8, "kl": 9.0}


def test_a_few_mistakes_do_not_exceed_the_kl_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of 40: their rate may be 1.4%, so the mean divergence may be 0.14 nats and not 0.5."""
    cost = Cost(0.5, [n < 2 for n in range(40)], [str(n) for n in range(40)])
    assert cost.least_kl == pytest.approx(0.5 / 0.05 * wilson(2, 40).low) and cost.least_kl < 0.2
    assert Cost(0.0, [False] * 40, [str(n) for n in range(40)]).least_kl == 0
    assert proof_of(monkeypatch, {False: 1, True: 0}, 0.5)["harmless"]["kl"] == 0.5


@pytest.mark.parametrize(
    ("stopped", "kl", "reason"), [(8, 0.01, "it stops 40"), (1, 1.0, "KL divergence")]
)
def test_ordinary_requests_are_budgeted(
    monkeypatch: pytest.MonkeyPatch, stopped: int, kl: float, reason: str
) -> None:
    with pytest.raises(CalibrationError, match=reason):
        proof_of(monkeypatch, {False: stopped, True: 0}, kl)
