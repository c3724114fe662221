"""Two generate calls in lockstep: who works when, what is measured, and that nothing is left."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import checkpoint, tiny
from vlm_safeguard.data import drawings
from vlm_safeguard.data.inputs import Query
from vlm_safeguard.evaluation.metrics import paired_timing
from vlm_safeguard.evaluation.metrics.paired_timing import Stepped
from vlm_safeguard.evaluation.metrics.timing import time_ratios
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.loading import load

NOTHING = torch.empty(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint.save(tmp_path_factory.mktemp("tiny"))


class Clock:
    """A clock that stands still, but for the work that is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.worked: list[str] = []
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def writer(self, name: str, costs: list[float]):  # type: ignore[no-untyped-def]
        """A generate call whose tokens take ``costs`` seconds."""

        def generate(streamer: Stepped) -> None:
            streamer.put(NOTHING)
            for cost in costs:
                self.now += cost
                self.worked.append(name)
                streamer.put(NOTHING)

        return generate


def test_each_token_stands_beside_the_same_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    # The machine is five times as slow for the third token, for both.
    plain = clock.writer("a", [2.0, 1.0, 5.0, 1.0])
    other = clock.writer("b", [3.0, 1.5, 7.5, 9.0])
    found = paired_timing.side_by_side(plain, other, 4)
    assert found == paired_timing.Paired(2.0, 1.0, 1.5, 1.5)
    assert clock.worked == ["b", "a", "a", "b", "b", "a", "a", "b", "b", "a"]
    only = paired_timing.side_by_side(clock.writer("a", [2.0]), clock.writer("b", [3.0]), 1)
    assert only.first == 1.5 and only.per_token != only.per_token


def test_who_goes_second_has_no_advantage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second call is quicker to its first token, whichever it is."""
    clock = Clock(monkeypatch)

    def writer(name: str):  # type: ignore[no-untyped-def]
        def generate(streamer: Stepped) -> None:
            quick = len(clock.worked) % 2
            clock.writer(name, [0.9 if quick else 1.0])(streamer)

        return generate

    found = paired_timing.side_by_side(writer("a"), writer("b"), 1)
    assert found.first == pytest.approx(1.0) and found.first_s == pytest.approx(0.95)


def test_an_error_is_raised_and_no_thread_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()

    def broken(streamer: Stepped) -> None:
        streamer.put(NOTHING)
        raise ValueError("no memory")

    clock = Clock(monkeypatch)
    with pytest.raises(ValueError, match="no memory"):
        paired_timing.side_by_side(clock.writer("a", [1.0, 1.0]), broken, 2)
    with pytest.raises(RuntimeError, match="has ended"):
        paired_timing.side_by_side(clock.writer("a", [1.0]), clock.writer("b", [1.0]), 2)
    assert threading.active_count() == before


def test_an_interrupt_gives_both_calls_up(monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    step, count = Stepped.step, 0

    def interrupted(self: Stepped) -> float:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Stepped, "step", interrupted)
    clock = Clock(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        paired_timing.side_by_side(clock.writer("a", [1.0] * 9), clock.writer("b", [1.0] * 9), 9)
    assert threading.active_count() == before and clock.worked == ["b", "a", "a"]


def test_a_twin_shares_weights_but_no_guard(folder: Path) -> None:
    loaded = load(folder)
    twin = paired_timing.twin(loaded.model)
    pointers = [parameter.data_ptr() for parameter in twin.parameters()]
    assert pointers == [parameter.data_ptr() for parameter in loaded.model.parameters()]
    inputs = encode(loaded, ["Hello"], [drawings.blank()])
    bare = loaded.model(**inputs).logits
    guard = tiny.guard(loaded.model, [tiny.gate("vlm", 2, threshold=-1e9)])
    with guard.attach(loaded.model, loaded.processor):
        assert not torch.equal(loaded.model(**inputs).logits, bare)
        assert torch.equal(twin(**inputs).logits, bare)


def test_a_defence_is_timed_on_what_it_does(folder: Path) -> None:
    loaded = load(folder)
    width = {
        text: encode(loaded, [text], [drawings.blank()])["input_ids"].shape[1]
        for text in ("Hello", "Hello again")
    }
    prompts: dict[bool, list[int]] = {False: [], True: []}
    steps: Counter[bool] = Counter()

    def note(model: Any, _: Any, inputs: dict[str, Any]) -> None:
        defended = model is loaded.model
        steps[defended] += 1
        if (columns := inputs["input_ids"].shape[1]) > 1:
            prompts[defended].append(columns)

    with loaded.model.register_forward_pre_hook(note, with_kwargs=True):
        found = time_ratios(
            loaded, None, _items(), reword=lambda text: f"{text} again", tokens=3, pairs=2
        )
    assert min(found) > 0
    # Two pairs, each once to its first token and once to its last.
    assert prompts == {False: [width["Hello"]] * 4, True: [width["Hello again"]] * 4}
    assert steps == {False: 8, True: 8}
    guard = tiny.guard(loaded.model, [tiny.gate("text", 2)])
    assert min(time_ratios(loaded, guard, _items(), tokens=3, pairs=1)) > 0


def _items() -> list[Query]:
    return [Query("Hello", drawings.blank())]
