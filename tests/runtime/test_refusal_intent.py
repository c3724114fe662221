"""A gate that also reads the LLM's own refusal intent, against a reference in float64."""

import pytest
import torch
from pydantic import ValidationError

from tests import tiny
from vlm_safeguard import method
from vlm_safeguard.artifact.config import Gate, TextFrame
from vlm_safeguard.errors import GuardError, GuardRuntimeError, ModelError
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.text_only import last_logits
from vlm_safeguard.runtime.gate import make_gate, refusal_signs

OPENINGS, WEIGHT, VERDICT = [17, 40, 201], 0.7, 3.0


def intent_gate(threshold=0.0, layers=(1, 3), weight=WEIGHT):
    return Gate(
        kind="intent",
        source="text",
        layers=list(layers),
        thresholds=[threshold] + [0.0] * (len(layers) - 1),
        openings=OPENINGS,
        intent_weight=weight,
        verdict_weight=VERDICT,
    )


def read_text(model, layers, prompt):
    """States at the last token by layer, and logits, of a pass over the text alone without a guard,
    in float64."""
    ids = torch.tensor([tiny.without_pictures(prompt)])
    states = {}
    handles = [
        model.get_decoder()
        .layers[layer]
        .register_forward_hook(
            lambda _, __, out, layer=layer: states.__setitem__(
                layer, (out if torch.is_tensor(out) else out[0])[0, -1].double()
            )
        )
        for layer in layers
    ]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1].double()
    for handle in handles:
        handle.remove()
    return states, logits


def expected(model, guard, prompt):
    """The score by its formula."""
    [gate] = guard.config.gates
    openings, weight = gate.openings, gate.intent_weight
    states, logits = read_text(model, gate.layers, prompt)
    vectors = guard.tensors["gate.0"].double()
    linear = sum(states[n] @ v for n, v in zip(gate.layers, vectors, strict=True))
    refuses = int(logits.argmax()) in openings
    return float(linear + weight * logits.softmax(0)[openings].sum().log() + VERDICT * refuses)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("weight", [WEIGHT, 0.0])
def test_the_score_is_that_of_the_formula_in_every_row(model, side, weight, tmp_path):
    tiny.guard(model, [intent_gate(weight=weight)]).save_pretrained(tmp_path)
    made = Guard.from_pretrained(tmp_path)
    with made.attach(model) as session, torch.no_grad():
        model(**tiny.batch(tiny.PROMPTS, side), use_cache=False)
        scores = [d.scores["text.0"][0] for d in session.decisions]
        assert scores == pytest.approx([sum(d.parts["text.0"]) for d in session.decisions])
        assert all(len(d.parts["text.0"]) == 3 for d in session.decisions)  # two layers, the signs
        whole = session.attestation
    wanted = [expected(model, made, prompt) for prompt in tiny.PROMPTS]
    assert scores == pytest.approx(wanted, abs=1e-4)
    assert whole is not None
    # Between two requests' scores the threshold tells them apart; the linear part alone does not.
    middle = sorted(wanted)[len(wanted) // 2] - 1e-3
    with tiny.with_thresholds(made, [[middle, 0.0]]).attach(model) as session, torch.no_grad():
        model(**tiny.batch(tiny.PROMPTS, side), use_cache=False)
        opened = [d.fired for d in session.decisions]
    assert opened == [score > middle for score in wanted]


@pytest.mark.parametrize("side", ["left", "right"])
def test_behind_a_probe_the_signs_are_those_of_the_text(model, side):
    """The probe's end is only one more state that the gate reads."""
    gate = intent_gate().model_copy(update={"reads_mean": True, "reads_probe": True})
    plain, made = tiny.guard(model, [intent_gate()]), tiny.guard(model, [gate])
    probed = []
    for guard in (plain, made):
        with guard.attach(model) as session, torch.no_grad():
            model(**tiny.batch(tiny.PROMPTS, side), use_cache=False)
            probed.append([d.parts["text.0"][-1] for d in session.decisions])
    assert probed[0] == pytest.approx(probed[1], abs=1e-4)
    tokens = made.config.frame.probe
    with made.attach(model) as session, torch.no_grad():
        model(**tiny.batch(tiny.PROMPTS, side), use_cache=False)
        scores = [d.scores["text.0"][0] for d in session.decisions]
    size = model.get_decoder().config.hidden_size
    vectors = made.tensors["gate.0"].double().split(size, 1)
    before, after = made.config.frame.before, made.config.frame.after
    for prompt, score, signs in zip(tiny.PROMPTS, scores, probed[0], strict=True):
        text = tiny.without_pictures(prompt)
        ends = [read_text(model, gate.layers, text[: n + 1])[0] for n in range(len(text))]
        words = ends[before : len(text) - after] or ends[before:]
        end, _ = read_text(model, gate.layers, text + tokens)
        total = signs
        for place, layer in enumerate(gate.layers):
            mean = torch.stack([states[layer] for states in words]).mean(0)
            seen = (ends[-1][layer], mean, end[layer])
            total += sum(float(s @ v[place]) for s, v in zip(seen, vectors, strict=True))
        assert score == pytest.approx(total, abs=1e-3)


def test_the_text_pass_hands_its_head_states_in_one_piece(model):
    """The request's own pass is left as it is, to the last bit."""
    seen = []
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, args, __: seen.append(args[0].is_contiguous()))
    with hook, tiny.guard(model, [intent_gate()]).attach(model), torch.no_grad():
        model(**tiny.batch(tiny.PROMPTS), use_cache=False, logits_to_keep=1)
    assert seen == [True, False]
    assert not head._forward_pre_hooks


def test_an_open_gate_steers_as_a_linear_one_does(model):
    """Only what opens it differs: the coordinates come from the same pass."""
    linear = tiny.guard(model, [tiny.gate("text", 1, 3, threshold=-1e6)])
    intent = tiny.guard(model, [intent_gate(-1e6)])
    inputs = tiny.batch(tiny.PROMPTS)
    found = []
    for guard in (linear, intent):
        with guard.attach(model):
            found.append(tiny.generate(model, inputs)[1])
    assert torch.equal(*found)
    with tiny.guard(model, [intent_gate(1e6)]).attach(model):
        shut = tiny.generate(model, inputs)[1]
    assert torch.equal(shut, tiny.generate(model, inputs)[1])


def test_where_a_texts_verdict_is_a_refusal_the_middle_is_restored(model):
    """Between its own coordinates and the anchors' mean, in the same batch as rows that get the
    anchors' mean alone, and for each returned sequence."""
    firsts = [int(read_text(model, (), prompt)[1].argmax()) for prompt in tiny.PROMPTS]
    openings = sorted(set(firsts))[::2]
    refused = [first in openings for first in firsts]
    assert 0 < sum(refused) < len(refused)
    gate = intent_gate(-1e6).model_copy(update={"openings": openings})

    def answered(guard, prompts):
        with guard.attach(model):
            inputs = tiny.batch(prompts)
            return tiny.generate(model, inputs, num_return_sequences=2, num_beams=2)[1]

    guards = {
        reference: tiny.guard(model, [gate], reference=reference, rank=2)
        for reference in ("text", "anchor", "verdict")
    }
    found = {reference: answered(guard, tiny.PROMPTS) for reference, guard in guards.items()}
    for row, (prompt, is_refused) in enumerate(zip(tiny.PROMPTS, refused, strict=True)):
        copies = slice(2 * row, 2 * row + 2)
        if not is_refused:
            assert torch.equal(found["verdict"][copies], found["anchor"][copies])
            continue
        for other in ("text", "anchor"):
            assert not torch.allclose(found["verdict"][copies], found[other][copies], atol=1e-2)
        anchored = guards["anchor"]
        layers, tensors = anchored.config.steering.layers, dict(anchored.tensors)
        for layer, state in read_text(model, layers, prompt)[0].items():
            own = tensors[f"directions.{layer}"].double() @ state
            tensors[f"anchor.{layer}"] = ((own + tensors[f"anchor.{layer}"]) / 2).float()
        middle = answered(Guard(anchored.config, tensors), [prompt])
        torch.testing.assert_close(found["verdict"][copies], middle, atol=1e-4, rtol=1e-4)


def test_verdicts_need_a_gate_that_gives_them(model):
    with pytest.raises(ValidationError, match="needs a gate of kind intent"):
        tiny.guard(model, [tiny.gate("text", 2)], reference="verdict")


def test_only_judged_texts_have_a_verdict(model):
    logits = torch.zeros(3, 300)
    logits[:2, OPENINGS[0]] = 5.0
    judged = torch.tensor([True, False, True])
    gate = make_gate(intent_gate(), torch.zeros(2, tiny.WIDTH))
    assert gate.refuses(logits, judged) == [True, False, False]
    linear = make_gate(tiny.gate("text", 2), torch.zeros(1, tiny.WIDTH))
    assert linear.refuses(logits, judged) == [False] * 3


def test_without_finite_logits_the_request_is_blocked(model):
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, __, output: output * torch.nan)
    try:
        with (
            tiny.guard(model, [intent_gate()]).attach(model),
            pytest.raises(GuardRuntimeError, match="NaN or Inf"),
        ):
            model.generate(**tiny.batch(tiny.PROMPTS), max_new_tokens=2)
    finally:
        handle.remove()
    with pytest.raises(ModelError, match="no `logits`"):
        last_logits((torch.zeros(1, 1, 4),))


def test_tokens_beyond_the_vocabulary_are_refused(model):
    gate = intent_gate().model_copy(update={"openings": [10**6]})
    with pytest.raises(GuardError, match="the probability of token 1000000"):
        tiny.guard(model, [gate]).attach(model)
    frame = TextFrame(before=1, after=1, probe=[5, 10**6])
    made = tiny.guard(model, [tiny.gate("text", 1, reads_probe=True)], frame=frame)
    with pytest.raises(GuardError, match="adds token 1000000 to a text"):
        made.attach(model)


@pytest.mark.parametrize(
    "wrong",
    [
        {"openings": []},
        {"openings": [3, 3]},
        {"intent_weight": 0.0, "verdict_weight": 0.0},
        {"kind": "linear"},
        {"verdict_weight": -1.0},
        {"kind": "linear", "openings": [], "intent_weight": 0.0},
        {"openings": [], "intent_weight": 0.0, "verdict_weight": 1.0},
        {"source": "vlm"},
        {"per_layer": True},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValidationError):
        Gate(**(intent_gate().model_dump() | wrong))


def test_the_intent_is_the_log_of_the_summed_probability():
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)) * 4
    found = method.refusal_intent(logits, torch.tensor(OPENINGS))
    wanted = logits.double().softmax(1)[:, OPENINGS].sum(1).log()
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)
    assert float(method.refusal_intent(logits, torch.arange(300)).abs().max()) < 1e-5


def test_the_verdict_is_whether_the_most_probable_token_opens_a_refusal():
    logits = torch.full((3, 300), -5.0)
    logits[0, 40] = logits[1, 41] = logits[2, 17] = 1.0
    logits[1, 40] = 0.9  # likely, but another token is likelier
    found = method.refusal_verdict(logits, torch.tensor(OPENINGS))
    assert found.tolist() == [1.0, 0.0, 1.0]


def test_a_text_without_a_verdict_has_an_intent():
    logits = torch.zeros(2, 300)
    logits[:, 40] = 5.0
    all_, one = (
        refusal_signs(logits, torch.tensor(OPENINGS), judged)
        for judged in (None, torch.tensor([False, True]))
    )
    assert torch.equal(all_[:, 0], one[:, 0])
    assert all_[:, 1].tolist() == [1.0, 1.0] and one[:, 1].tolist() == [0.0, 1.0]


def test_what_the_model_would_refuse_opens_the_gate(model):
    """With openings that are the model's own first token, and with others."""
    prompt = tiny.PROMPTS[0]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tiny.without_pictures(prompt)])).logits[0, -1]
    first, other = logits.topk(2).indices.tolist()
    for opening, refuses in ((first, True), (other, False)):
        gate = intent_gate().model_copy(update={"openings": [opening]})
        made = tiny.guard(model, [gate])
        with made.attach(model) as session, torch.no_grad():
            model(**tiny.batch([prompt], "left"), use_cache=False)
            (decision,) = session.decisions
        plain = gate.model_copy(update={"verdict_weight": 0.0})
        with tiny.guard(model, [plain]).attach(model) as session, torch.no_grad():
            model(**tiny.batch([prompt], "left"), use_cache=False)
            (before,) = session.decisions
        added = sum(decision.scores["text.0"]) - sum(before.scores["text.0"])
        assert added == pytest.approx(VERDICT * refuses, abs=1e-4)
