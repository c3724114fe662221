"""Speed in vLLM: the variants of the guard, the order of steps and the page; no engine runs."""

from pathlib import Path
from typing import ClassVar

import pytest
import torch

from bench import timing, vllm_speed
from bench.vllm_engine import Answers, Variant, in_lockstep
from vlm_safeguard.guard import Guard, reads_text


class Said:
    """An engine that takes ``turns`` to say what it is told to; ``log`` is shared."""

    asked: ClassVar = []

    def __init__(self, name, seconds, tokens, log, opened=0, turns=3, guard=1.0):
        self.name, self.own, self.tokens, self.log = name, seconds, tokens, log
        self.opened, self.turns, self.guard = opened, turns, guard
        Said.asked = []

    def ask(self, prompts, tokens, picture, guarded):
        self.count, self.left = len(prompts), self.turns
        self.seconds = self.own * (self.guard if guarded else 1)
        Said.asked.append((self, guarded))

    def turn(self):
        self.log.append(self.name)
        self.left -= 1
        spent = [self.seconds * self.count / self.turns] * self.turns
        said = Answers(spent, [60] * self.count, self.tokens, [], self.opened)
        return None if self.left else said


def load():
    return vllm_speed.Load(Path("model"), ["a", "b"], ["c"], [1, 2], tokens=4, rounds=2)


@pytest.mark.parametrize("name", ["1", "half", "all"])
def test_a_variant_guards_its_layers_and_reads_no_text(tmp_path, name):
    shipped = Guard.from_pretrained("embedded")
    layers = vllm_speed.layer_sets(24)[name]
    vllm_speed.on_layers(shipped, layers, -5.0, tokens=None).save_pretrained(tmp_path)
    made = Guard.from_pretrained(tmp_path)
    assert made.config.steering.layers == layers and made.config.steering.tokens is None
    assert set(made.config.gates[0].layers) == {n for n in layers if n % 2 == 0 and 4 <= n <= 22}
    assert sum(made.config.gates[0].thresholds) == -5.0
    assert not reads_text(made) and not made.config.reads_pictures


def test_a_gate_in_a_requests_own_pass_is_the_papers(tmp_path):
    shipped = Guard.from_pretrained("embedded")
    vllm_speed.on_layers(shipped, [4, 6], 0.0).save_pretrained(tmp_path)
    saved = Guard.from_pretrained(tmp_path)
    assert saved.config.frame is None and not saved.config.gates[0].reads_mean
    first = [shipped.tensors[f"directions.{layer}"][0] for layer in (4, 6)]
    assert torch.equal(saved.tensors["gate.0"], torch.stack(first))


def test_a_shut_threshold_opens_on_a_harmful_question_alone():
    questions, harmful = [[1.0, 5.0], [2.0, 0.0]], [[0.0, 0.0], [4.0, 6.0]]
    assert vllm_speed.shut_threshold((questions, harmful), [0]) == 3.0
    assert vllm_speed.shut_threshold((questions, harmful), [0, 1]) == 8.0
    with pytest.raises(RuntimeError):
        vllm_speed.shut_threshold((harmful, questions), [0])


def test_engines_go_in_lockstep_and_the_others_last_steps_are_its_own():
    log = []
    found = in_lockstep([Said("a", 1.0, [], log), Said("b", 2.0, [], log, turns=5)], ["x"], 4)
    assert "".join(log) == "ababab" + "bb" and [one.seconds for one in found] == [1.0, 2.0]


def test_engines_change_roles_and_take_turns_in_going_first_and_two_rounds_do_not_count():
    """The first of two alike takes twice as long as the other, and the guard a quarter more."""
    log, found = [], vllm_speed.Found()
    slow = Said("x", 2.0, [[1]], log, opened=2, turns=1, guard=1.25)
    fast = Said("x", 1.0, [[1]], log, opened=2, turns=1, guard=1.25)
    vllm_speed._compare(slow, fast, Variant("x", guard=Path("guard")), load(), found, True)
    bare = [engine for engine, guarded in Said.asked if not guarded]
    assert bare[:6] == [fast, slow] * 3 and len(bare) == 10 + 6
    first = [engine for engine, _ in Said.asked[::2]]
    assert first[:6] == [slow, slow, fast, fast, slow, slow]
    assert found.plain == {1: [4.0, 2.0] * 4, 2: [4.0, 2.0] * 2}
    assert found.rows["x"][2].median == pytest.approx(0.8) and found.rows["x"][1].count == 4
    facts = timing.as_json(vllm_speed._facts(found))
    assert facts["ratios"]["x"]["2"]["median"] == 0.8 and facts["opened"] == {"x": 2}
    page = vllm_speed.page({"eager": found}, load())
    assert "| x | 2 of 2 | 0.800 [0.800, 0.800] | 0.800 [0.800, 0.800] |" in page


def test_a_peer_keeps_its_role():
    found = vllm_speed.Found()
    lens, plain = Said("lens", 2.0, [[1]], [], turns=1), Said("unguarded", 1.0, [[2]], [], turns=1)
    vllm_speed._compare(lens, plain, Variant("lens", lens=Path("peers")), load(), found, False)
    assert found.rows["lens"][2].median == 0.5
    assert {engine for engine, guarded in Said.asked if guarded} == {lens}


def test_engines_are_compared_step_by_step_where_they_take_the_same_steps():
    def said(*turns):
        return Answers(list(turns), [], [], [], 0)

    pairs = [
        (said(1.0, 8.0, 1.0), said(2.0, 10.0, 1.0)),
        (said(1.0, 8.0, 1.0), said(9.0, 10.0, 1.0)),
    ]
    assert vllm_speed.speed_ratio(pairs) == timing.Spread(0.8, 0.8, 0.8, 3)
    others = [(said(1.0, 8.0, 1.0), said(1.0, 4.0)), (said(1.0, 8.0, 1.0), said(10.0, 10.0))]
    assert vllm_speed.speed_ratio(others).median == 1.0


def test_a_peer_that_changes_no_answer_is_not_measured():
    plain, peer = Said("unguarded", 1.0, [[1]], []), Said("lens", 1.0, [[1]], [])
    variant = Variant("lens", lens=Path("peers"))
    with pytest.raises(RuntimeError, match="does not steer"):
        vllm_speed._compare(peer, plain, variant, load(), vllm_speed.Found(), False)
