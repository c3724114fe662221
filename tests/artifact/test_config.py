"""Settings that make no sense are refused."""

import json

import pytest
import torch
from pydantic import ValidationError

from tests import tiny
from tests.artifact.files import GATES, edit
from vlm_safeguard.artifact.config import Gate, Steering, TextFrame
from vlm_safeguard.errors import GuardError
from vlm_safeguard.guard import Guard


@pytest.mark.parametrize(
    "changes",
    [
        {"surprise": 1},
        {"gates": []},
        {"gates": [{"source": "text", "layers": [1], "thresholds": [0.0, 1.0]}]},
        {"gates": [{"source": "text", "layers": [1, 1], "thresholds": [0.0, 1.0]}]},
        {"gates": [{"source": "text", "layers": [1], "thresholds": [float("nan")]}]},
        {"gates": [{"source": "text", "layers": [1], "thresholds": [float("inf")]}]},
        {"gates": [{"source": "picture", "layers": [1], "thresholds": [0.0]}]},
        {"steering": {"mode": "jailbreak", "layers": [1]}},
        {"steering": {"mode": "restore", "layers": []}},
        {"steering": {"mode": "restore", "layers": [2, 4], "rank": 0}},
        {"steering": {"mode": "restore", "layers": [2, 4], "rank": 2}},
        {"steering": {"mode": "restore", "layers": [2, 4], "rank": 3, "alpha": float("nan")}},
        {"steering": {"mode": "restore", "layers": [2, 99], "rank": 3}},
        {"steering": {"mode": "restore", "layers": [2, 4], "rank": 3, "tokens": 0}},
        {"markup": {"token_ids": []}},
        {"frame": {"before": 1, "after": 1}},
        {"gates": [{"source": "text", "layers": [1], "thresholds": [0.0], "reads_mean": True}]},
        {"gates": [{"source": "text", "layers": [1], "thresholds": [0.0], "reads_probe": True}]},
    ],
    ids=lambda changes: json.dumps(changes)[:70],
)
def test_settings_that_make_no_sense_are_refused(folder, changes):
    edit(folder, **changes)
    with pytest.raises(GuardError):
        Guard.from_pretrained(folder)


def test_a_probe_is_read_and_holds_no_picture(model):
    probe = {"before": 1, "after": 1, "probe": [5]}
    read, unread = (tiny.gate("text", 1, reads_mean=True, reads_probe=one) for one in (True, False))
    tiny.guard(model, [read], frame=TextFrame(**probe))
    for gate, frame in (
        (read, TextFrame(before=1, after=1)),
        (unread, TextFrame(**probe)),
        (read, TextFrame(**probe | {"probe": [5, tiny.IMAGE]})),
    ):
        with pytest.raises(ValidationError, match="probe"):
            tiny.guard(model, [gate], frame=frame)


@pytest.mark.parametrize("reference", ["text", "anchor"])
@pytest.mark.parametrize("size", [0.0, 1e-6])
def test_erase_under_the_name_of_restore_is_refused(model, size, reference):
    sound = tiny.guard(model, GATES, reference=reference)
    tensors = sound.tensors | {"anchor.2": torch.full((3,), size)}
    with pytest.raises(GuardError, match="anchor of layer 2 is zero"):
        Guard(sound.config, tensors)
    later = tiny.guard(model, GATES, reference=reference, tokens=3, later="refusal")
    rows = later.tensors["refusal.2"].clone()
    rows[1] = size
    with pytest.raises(GuardError, match="refusal of layer 2 is zero"):
        Guard(later.config, later.tensors | {"refusal.2": rows})
    added = tiny.guard(model, GATES, mode="add", query="pass")  # has no use for its anchors
    Guard(added.config, added.tensors | {"anchor.2": torch.zeros(3)})


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "restore", "tokens": None},
        {"mode": "restore", "tokens": 1},
        {"mode": "restore", "tokens": 65},
        {"mode": "add", "tokens": 3},
        {"mode": "erase", "tokens": 3},
    ],
)
def test_the_states_of_refusals_are_restored_at_some_tokens_only(settings):
    with pytest.raises(ValidationError, match="needs mode `restore` and 2 to 64 tokens"):
        Steering(layers=[1], later="refusal", **settings)


@pytest.mark.parametrize(
    ("gate", "steering"),
    [
        (tiny.gate("vlm", 1, 5), {"tokens": 1}),
        (tiny.gate("vlm", 5), {"tokens": 1, "positions": "all"}),
        (tiny.gate("vlm", 3, per_layer=True), {}),
        (tiny.gate("text", 1, 3, per_layer=True), {"tokens": 1}),
    ],
)
def test_a_gate_that_could_never_steer_is_refused(model, gate, steering):
    reachable = tiny.gate("text", 5)
    with pytest.raises(ValidationError, match="gate 1 "):
        tiny.guard(model, [reachable, gate], **steering)


@pytest.mark.parametrize(
    ("gate", "steering"),
    [
        (tiny.gate("vlm", 5), {"tokens": 2}),
        (tiny.gate("vlm", 1, 4), {"tokens": 1}),
        (tiny.gate("vlm", 4, per_layer=True), {"tokens": 1}),
        (tiny.gate("text", 5), {"tokens": 1}),
    ],
)
def test_a_gate_that_is_taken_does_steer(model, gate, steering):
    made = tiny.with_thresholds(tiny.guard(model, [gate], **steering), [[-1e9] * len(gate.layers)])
    with made.attach(model) as session:
        model.generate(**tiny.batch(tiny.PROMPTS), max_new_tokens=3)
        assert all(row.decision.fired and row.changed for row in session.attestation.rows)


def test_a_gate_without_thresholds_is_refused():
    with pytest.raises(ValidationError, match="threshold"):
        Gate(source="text", layers=[1], thresholds=[])


def test_steering_without_layers_is_refused():
    with pytest.raises(ValidationError, match="layers"):
        Steering(mode="restore", layers=[])


def test_modes_and_kinds_that_nobody_registered_are_refused(model):
    with pytest.raises(GuardError, match=r"unknown steering mode 'defer'.* restore, add, erase"):
        tiny.guard(model, [tiny.gate("text", 2)], mode="defer")
    odd = Gate(kind="odd", source="text", layers=[2], thresholds=[0.0])
    with pytest.raises(GuardError, match=r"unknown kind of gate 'odd'.* linear"):
        tiny.guard(model, [odd])
