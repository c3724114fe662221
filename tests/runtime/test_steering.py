"""Where a dose goes, and steering modes and gates of one's own."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny
from vlm_safeguard.artifact.config import Gate, Steering
from vlm_safeguard.errors import GuardError
from vlm_safeguard.guard import Guard, reads_text
from vlm_safeguard.runtime.gate import GATES, LinearGate
from vlm_safeguard.runtime.steering import MODES, Steerer, SteeringMode


def expected_positions(lasts, width, total, tokens, everywhere):
    table = torch.zeros(len(lasts), total, dtype=torch.bool)
    for row, last in enumerate(lasts):
        for column in range(total):
            number = 1 if column == last else column - width + 2  # token that this column makes
            made = column == last or column >= width
            table[row, column] = (made and (tokens is None or number <= tokens)) or (
                everywhere and column < width
            )
    return table


def steered(steerer, lasts, width, columns):
    """Which places (rows, len(columns)) of a call a steerer's spans cover."""
    request = SimpleNamespace(done=columns.start, prompt_width=width, last_prompt=lasts)
    table = torch.zeros(len(lasts), len(columns), dtype=torch.bool)
    for span in steerer.spans(request, columns):
        if isinstance(span.columns, slice):
            table[:, span.columns] = True
        else:
            table[range(len(lasts)), span.columns] = True
    return table


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=4),
    st.integers(0, 5),
    st.none() | st.integers(1, 6),
    st.booleans(),
    st.lists(st.integers(1, 11), max_size=4),
)
def test_positions_do_not_depend_on_how_the_sequence_is_cut(
    lasts, generated, tokens, everywhere, cuts
):
    positions = "all" if everywhere else "generated"
    settings = Steering(mode="erase", layers=[0], tokens=tokens, positions=positions)
    directions = {"directions.0": torch.eye(1, 4), "anchor.0": torch.ones(1)}
    steerer = Steerer(settings, directions, text_gates=False)
    width = 7
    # Left padding puts q of every row into the last column; right padding anywhere, and the prompt
    # then comes in one call.
    for places, whole_prompt in ((lasts, True), ([6] * len(lasts), everywhere)):
        total = width + generated
        allowed = [cut for cut in cuts if cut < total and not (whole_prompt and cut < width)]
        bounds = sorted({0, total, *allowed})
        parts = [
            steered(steerer, places, width, range(first, end))
            for first, end in itertools.pairwise(bounds)
        ]
        expected = expected_positions(places, width, total, tokens, everywhere)
        assert torch.equal(torch.cat(parts, 1), expected)


class Mirror(SteeringMode):
    """Sets the anchors' coordinates with their sign turned."""

    def target(self, request, layer, directions):
        return -self.anchor[layer].to(directions.device).expand(request.rows, -1)


class Norm(LinearGate):
    """Scores how long a state is."""

    def scores(self, states, places=slice(None)):
        return states.norm(dim=-1) - self.thresholds[places]


class Sure(LinearGate):
    """Scores how large the largest logit of the first answer token is."""

    reads_logits = True

    def scores(self, states, places=slice(None)):
        return -self.thresholds[places].expand(len(states), -1)

    def refusal(self, logits, judged):
        return logits.max(-1).values


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(MODES, "mirror", Mirror)
    monkeypatch.setitem(GATES, "norm", Norm)
    monkeypatch.setitem(GATES, "sure", Sure)


def outputs_of_layer(model, layer, guard):
    """States (B, T, d) after a layer of a guarded prompt, and the session's decisions."""
    seen = []
    with guard.attach(model) as session:
        handle = (
            model.get_decoder()
            .layers[layer]
            .register_forward_hook(
                lambda _, __, output: seen.append(output if torch.is_tensor(output) else output[0])
            )
        )
        with torch.no_grad():
            model(**tiny.batch(tiny.PROMPTS), use_cache=False)
        handle.remove()
        return seen[-1], session.decisions


def test_a_mode_and_a_gate_of_ones_own(model, registered, tmp_path):
    """Each is a class of a few lines and an entry in its registry."""
    gate = Gate(kind="norm", source="text", layers=[2], thresholds=[0.0])
    made = tiny.guard(model, [gate], mode="mirror", layers=[3])
    made.save_pretrained(tmp_path)
    states, decisions = outputs_of_layer(model, 3, Guard.from_pretrained(tmp_path))
    assert all(d.fired and d.scores["text.0"][0] > 0 for d in decisions)
    rows = made.tensors["directions.3"]
    torch.testing.assert_close(
        states[:, -1] @ rows.T,
        -made.tensors["anchor.3"].expand(len(states), -1),
        atol=1e-4,
        rtol=1e-4,
    )
    long = max(d.scores["text.0"][0] for d in decisions)
    _, decisions = outputs_of_layer(model, 3, tiny.with_thresholds(made, [[long]]))
    assert [d.fired for d in decisions].count(True) < len(tiny.PROMPTS)


def test_a_gate_of_ones_own_reads_logits(model, registered, tmp_path):
    """Those of the text alone; the gate is decided like any other."""
    made = tiny.guard(model, [Gate(kind="sure", source="text", layers=[2], thresholds=[0.0])])
    made.save_pretrained(tmp_path)
    _, decisions = outputs_of_layer(model, 3, Guard.from_pretrained(tmp_path))
    scores = [d.scores["text.0"][0] for d in decisions]
    with torch.no_grad():
        texts = [torch.tensor([tiny.without_pictures(prompt)]) for prompt in tiny.PROMPTS]
        expected = [float(model(input_ids=ids).logits[0, -1].max()) for ids in texts]
    assert scores == pytest.approx(expected, rel=1e-4)
    assert [d.fired for d in decisions] == [score > 0 for score in scores]
    _, decisions = outputs_of_layer(model, 3, tiny.with_thresholds(made, [[max(scores)]]))
    assert not any(d.fired for d in decisions)


@pytest.mark.parametrize(("source", "per_layer"), [("vlm", False), ("text", True)])
def test_a_gate_that_would_get_no_logits_is_refused(model, registered, source, per_layer):
    """It would never be decided."""
    gate = Gate(kind="sure", source=source, layers=[2], thresholds=[0.0], per_layer=per_layer)
    with pytest.raises(GuardError, match="sure reads logits"):
        tiny.guard(model, [gate]).attach(model)


def test_a_mode_says_whether_it_needs_the_text(model, monkeypatch):
    """Engines make a text-only pass for a mode that they do not know by name."""

    class Text(SteeringMode):
        needs_text = True

    monkeypatch.setitem(MODES, "mirror", Mirror)
    monkeypatch.setitem(MODES, "text", Text)
    by_mode = {
        mode: reads_text(tiny.guard(model, [tiny.gate("vlm", 2)], mode=mode))
        for mode in ("mirror", "text", "restore", "erase")
    }
    assert by_mode == {"mirror": False, "text": True, "restore": True, "erase": False}
    assert reads_text(tiny.guard(model, [tiny.gate("text", 2)], mode="mirror"))
