"""Each mode against the model and the guard used by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests import tiny
from tests.server.live import open_guard, serving
from tests.server.test_clients import data_uri
from vlm_safeguard.errors import GuardRuntimeError
from vlm_safeguard.model.chat import prepare
from vlm_safeguard.model.loading import load
from vlm_safeguard.server.settings import Settings
from vlm_safeguard.server.telemetry import Telemetry
from vlm_safeguard.server.transformers_engine import TransformersEngine

NEW = 6
PICTURE = Image.new("RGB", (24, 24), (200, 30, 30))
WORDS = "What is this?"


def by_hand(folder: Path, guarded: bool) -> str:
    """The answer of the model itself, and of the model under the guard."""
    loaded = load(folder)
    content = [{"type": "image", "image": PICTURE}, {"type": "text", "text": WORDS}]
    inputs = prepare(loaded.processor, [[{"role": "user", "content": content}]])

    def answer() -> str:
        output, _ = tiny.generate(loaded.model, inputs, max_new_tokens=NEW)
        return str(loaded.processor.tokenizer.decode(output[0], skip_special_tokens=True))

    if not guarded:
        return answer()
    with open_guard(loaded.model).attach(loaded.model):
        return answer()


def ask(live: Any, **fields: Any) -> Any:
    content = [
        {"type": "image_url", "image_url": {"url": data_uri(PICTURE)}},
        {"type": "text", "text": WORDS},
    ]
    return live.chat(content, max_tokens=NEW, **fields)


def test_enforce_answers_as_the_guarded_model_does(folder: Path) -> None:
    with serving(folder) as live:
        reply = ask(live)
    body = reply.json()
    text = body["choices"][0]["message"]["content"]
    assert text == by_hand(folder, guarded=True) != by_hand(folder, guarded=False)
    assert reply.headers["x-safeguard-status"] == "guarded"
    told = body["safeguard"]
    assert (told["status"], told["mode"], told["fired"]) == ("guarded", "enforce", True)
    assert told["pictures"] == {"sent": 1, "reached_model": 1, "words_read": 0}
    assert body["usage"]["completion_tokens"] == NEW


def test_monitor_answers_as_the_model_does_and_says_what_it_saw(folder: Path) -> None:
    with serving(folder, mode="monitor") as live:
        reply = ask(live)
    body = reply.json()
    assert body["choices"][0]["message"]["content"] == by_hand(folder, guarded=False)
    assert reply.headers["x-safeguard-status"] == body["safeguard"]["status"] == "monitor"
    assert body["safeguard"]["fired"] and body["safeguard"]["gates"] == ["text", "vlm"]


@pytest.mark.parametrize("stream", [False, True])
def test_refuse_answers_with_the_refusal_alone(folder: Path, stream: bool, tmp_path: Path) -> None:
    with serving(folder, tmp_path / "log", mode="refuse", refusal="No, thanks.") as live:
        reply = ask(live, stream=stream)
        outcome = live.engine.telemetry.requests.labels("chat", "refused", "refuse")._value.get()
    assert outcome == 1
    if stream:
        assert '"content": "No, thanks."' in reply.text and reply.text.count('"content": "') == 2
        assert '"finish_reason": "content_filter"' in reply.text
        assert reply.text.rstrip().endswith("data: [DONE]")
    else:
        choice = reply.json()["choices"][0]
        assert choice["message"]["content"] == "No, thanks."
        assert choice["finish_reason"] == "content_filter"
        assert reply.json()["usage"]["completion_tokens"] == 0
    assert '"outcome": "refused"' in (tmp_path / "log").read_text()


def test_the_gates_judge_texts_and_pictures(folder: Path) -> None:
    with serving(folder) as live:
        texts = live.client.post("/v1/moderations", json={"input": ["one", "two"]}).json()
        parts = [
            {"type": "image_url", "image_url": {"url": data_uri(PICTURE)}},
            {"type": "text", "text": WORDS},
        ]
        pictured = live.client.post("/v1/moderations", json={"input": parts}).json()
        scores = ask(live).json()["safeguard"]["scores"]
        empty = live.client.post("/v1/moderations", json={"input": []})
    assert [one["flagged"] for one in texts["results"]] == [True, True]
    [result] = pictured["results"]
    assert result["gates"] == ["text", "vlm"]
    assert result["gate_scores"]["text.0"] == pytest.approx(max(scores["text.0"]), abs=1e-4)
    assert empty.status_code == 400


@pytest.mark.parametrize(
    ("guard", "reason"),
    [
        (lambda model: open_guard(model, 1e9), "no gate opens"),
        (lambda model: tiny.always(model, layers=[2], alpha=0.0, mode="add"), "changes nothing"),
    ],
)
def test_a_guard_that_does_nothing_is_not_served(folder: Path, guard: Any, reason: str) -> None:
    loaded = load(folder)
    engine = TransformersEngine(loaded, guard(loaded.model), Settings(model="tiny"), Telemetry())
    with pytest.raises(GuardRuntimeError, match=reason):
        engine.start()
    assert not engine.alive or not engine.ready.is_set()
    guard(loaded.model).attach(loaded.model).detach()  # nothing is left attached
