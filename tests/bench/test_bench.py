"""The benchmark's arithmetic, its order of runs and its page; no figure is judged here."""

import gc
import json
from contextlib import contextmanager

import pytest
import torch

from bench import __main__, decoding, guards, overhead, page, peers, speed, subjects, timing
from tests import families


def test_spread_and_ratios():
    assert timing.spread([7.0]) == timing.Spread(7.0, 7.0, 7.0, 1)
    assert timing.spread([4, 1, 3, 2, 5]) == timing.Spread(3, 2, 4, 5)
    assert timing.weighted_spread([3, 1, 2, 4], [1, 5, 1, 1]) == timing.Spread(1, 1, 2, 4)
    assert timing.ratios([2, 6, 12], [1, 2, 3]) == timing.Spread(3, 2.5, 3.5, 3)
    with pytest.raises(ValueError):  # runs without a partner
        timing.ratios([1, 2], [1])


def test_every_setup_runs_once_a_round_in_random_order_without_collection():
    log, on = [], []

    @contextmanager
    def setup(name):
        on.append(name)
        yield
        on.remove(name)

    def work(name):
        assert on == [name] and not gc.isenabled()
        log.append(name)
        return len(log)

    setups = {name: lambda name=name: setup(name) for name in "abcd"}
    found = timing.interleaved(setups, work, rounds=6)
    rounds = [log[start : start + 4] for start in range(0, len(log), 4)]
    assert len(rounds) == 7  # one that does not count
    assert all(sorted(one) == list("abcd") for one in rounds)
    assert len(set(map(tuple, rounds))) > 1
    assert {name: len(results) for name, results in found.items()} == dict.fromkeys("abcd", 6)
    assert min(min(results) for results in found.values()) > 4
    assert gc.isenabled()


def test_json_has_five_digits_and_names_for_keys():
    found = timing.as_json({1: timing.Spread(1 / 3, 0.0, 2.0, 5), "a": [1.234567, "b", 12345678]})
    assert found == {
        "1": {"median": 0.33333, "low": 0.0, "high": 2.0, "count": 5},
        "a": [1.2346, "b", 12345678],
    }


def test_table_and_figures():
    assert page.table(["a", "b"], [["x", "1"]]) == "| a | b |\n|---|---:|\n| x | 1 |"
    assert page.figure({"median": 1.2344, "low": 1, "high": 2}) == "1.234 (1.000 to 2.000)"
    assert page.figure(None) == "–"


def test_the_share_of_the_text_only_pass():
    assert speed.share(words=62, whole=638, last=31, depth=32) == pytest.approx(62 / 638)
    assert speed.share(words=10, whole=40, last=14, depth=30) == pytest.approx(0.125)


@pytest.fixture(scope="module")
def subject():
    return subjects.subjects(families.llava())


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("is_open", [True, False])
def test_gates_are_forced(subject, text, is_open):
    layers = guards.layer_sets(subject.vlm.depth)["all"]
    made = guards.restoring(subject.vlm, layers, text=text, is_open=is_open)
    with torch.no_grad(), made.attach(subject.vlm.model) as session:
        subject.vlm.model(**subject.inputs(2, picture=True))
    assert [d.fired for d in session.decisions] == [is_open] * 2
    assert [d.by_text for d in session.decisions] == [is_open and text] * 2


def test_calls_by_hand_are_those_of_generate(subject):
    """A batch padded on the left, call by call."""
    model, inputs = subject.vlm.model, subject.inputs(3, picture=True)
    assert not inputs["attention_mask"].all()
    width, by_hand = inputs["input_ids"].shape[1], decoding.Decoding(model, inputs)
    with torch.inference_mode():
        generated = model.generate(
            **inputs,
            do_sample=False,
            min_new_tokens=5,
            max_new_tokens=5,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for step, logits in enumerate(generated.logits):
            by_hand.call()
            torch.testing.assert_close(by_hand.logits, logits, atol=1e-5, rtol=1e-5)
            by_hand.prepare(generated.sequences[:, width + step])
    assert step == 4


def test_idle_layers_are_what_they_were_afterwards(subject):
    model, inputs = subject.llm.model, subject.inputs(2, picture=False)
    with torch.no_grad():
        before = model(**inputs).logits
        with overhead._idle_layers(model):
            assert not torch.equal(model(**inputs).logits, before)
        assert torch.equal(model(**inputs).logits, before)


def test_every_part_runs_and_the_page_tells_of_it(subject, monkeypatch):
    monkeypatch.setattr(peers, "LIBRARIES", {})  # they are in the benchmark's own environment
    monkeypatch.setattr(overhead, "STEPS", 3)
    found = {"dtype": "bfloat16"} | __main__.measure(subject, 1, quick=True)
    found["memory"] = {"recording": {8: 1.0, 32: 1.0}, "generating": {"guarded": 2.0}}
    found = json.loads(json.dumps(timing.as_json(found)))
    text = page.page(found)
    for title in (
        "On the VLM",
        "predicts",
        "One request",
        "one forward pass",
        "Other libraries",
        "Parts of the overhead",
        "Memory",
    ):
        assert title in text
    assert "A smoke test" in text
    assert "--dtype bfloat16" in text and "(assets/bench-bfloat16.json)" in text
    ratios = found["vlm"]["1"]["ratios"]
    assert set(found["vlm"]["1"]["predicted_first"]) <= set(ratios)
    [single] = found["one_by_one"]
    words, whole = single["tokens"]["text"], single["tokens"]["whole"]
    assert single["predicted"]["open"] == pytest.approx(1 + words / whole, rel=1e-4)
    states = {"shut", "shut, with refusal signs", "open"}
    assert set(single["first"]) == {speed.AGAIN} | states
    assert all("per_token" in row for name, row in ratios.items() if "text-only" not in name)
