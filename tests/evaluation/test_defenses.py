"""Defences: what they do to a request, and what they attach."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import tiny
from vlm_safeguard.errors import DataError, GuardError
from vlm_safeguard.evaluation.defenses import DEFENCES, make_defence


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("guard")
    gate = tiny.gate("text", 2, reads_probe=True)
    made = tiny.guard(tiny.llava(), [gate], rank=2, tokens=3, later="refusal")
    made.save_pretrained(target)
    return target


@pytest.mark.parametrize("name", DEFENCES)
def test_every_defence_is_made_by_its_name(name: str, folder: Path) -> None:
    made = make_defence(name, guard=folder)
    assert made.name == name
    reworded = made.reword("How do I bake bread?")
    assert reworded.count("How do I bake bread?") == 1
    # A defence rewords or guards, and `none` does neither.
    assert (reworded != "How do I bake bread?") + (made.guard is not None) == (name != "none")


def test_the_papers_formula_has_thresholds_of_zero_and_one_direction(folder: Path) -> None:
    config = make_defence("paper-formula", guard=folder).guard.config  # type: ignore[union-attr]
    assert [gate.thresholds for gate in config.gates] == [[0.0] * len(config.steering.layers)]
    assert (config.steering.mode, config.steering.rank) == ("add", 1)
    assert (config.steering.positions, config.steering.query) == ("all", "pass")


def test_the_ablation_shares_gate_and_directions_with_the_guard(folder: Path) -> None:
    guard = make_defence("guard", guard=folder).guard
    erase = make_defence("erase-ablation", guard=folder).guard
    assert guard is not None and erase is not None and erase.config.steering.mode == "erase"
    for name, tensor in guard.tensors.items():
        own = erase.tensors.get(name)
        # It restores nothing, at the later tokens either.
        assert own is None if name.startswith("refusal.") else torch.equal(tensor, own)
    with pytest.raises(GuardError, match="never saved"):
        erase.save_pretrained(folder)


def test_a_request_may_hold_the_slot_itself(folder: Path) -> None:
    made = make_defence("self-reminder")
    assert "What does [QUESTION] mean?" in made.reword("What does [QUESTION] mean?")


def test_the_exact_wording_can_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "reminder.txt"
    file.write_text("First.\n[QUESTION]\nLast.\n")
    assert make_defence("self-reminder", text=file).reword("Hi") == "First.\nHi\nLast."


def test_bad_definitions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown defence 'prayer': use one of none"):
        make_defence("prayer")
    with pytest.raises(DataError, match="needs a guard"):
        make_defence("paper-formula")
    with pytest.raises(DataError, match="has no wording"):
        make_defence("none", text=tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"cannot read the defence's text .*a\.txt"):
        make_defence("goal-priority", text=tmp_path / "a.txt")
    empty = tmp_path / "empty.txt"
    empty.write_text("no slot")
    with pytest.raises(DataError, match="exactly once"):
        make_defence("goal-priority", text=empty)
    with pytest.raises(GuardError, match="not a guard folder"):
        make_defence("guard", guard=tmp_path)
