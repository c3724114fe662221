"""The logic of the playground, without a browser."""

from __future__ import annotations

import asyncio
import builtins
import math
import socket
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from threading import Event as Flag
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests import tiny
from tests.playground.conftest import Subject
from vlm_safeguard.cli.commands import app
from vlm_safeguard.data.inputs import Query
from vlm_safeguard.data.prompts import anchors, evaluation
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.chat import encode
from vlm_safeguard.playground.anchors import AnchorMap, anchor_map
from vlm_safeguard.playground.answers import SIDES, Answerer, Decided, Event, SideDone, SideText
from vlm_safeguard.playground.desk import Desk
from vlm_safeguard.playground.examples import examples
from vlm_safeguard.playground.loopback import LoopbackOnly
from vlm_safeguard.playground.svg import bars, plot_map, plot_scores
from vlm_safeguard.playground.wording import gate_title, verdict
from vlm_safeguard.runtime.attestation import Decision
from vlm_safeguard.utils.network import LOOPBACK, listen
from vlm_safeguard.utils.progress import Progress

PICTURE = Image.new("RGB", (24, 24), "gray")
QUIET = Progress(quiet=True)


def events_of(
    subject: Subject, query: Query, tokens: int = 6, flag: Flag | None = None
) -> list[Event]:
    found: list[Event] = []
    answerer = Answerer(subject.loaded, subject.artifact, tokens)
    answerer.answer(query, found.append, flag or Flag())
    return found


def text_of(events: list[Event], side: str) -> str:
    return "".join(
        event.text for event in events if isinstance(event, SideText) and event.side == side
    )


def own_answer(subject: Subject, query: Query, tokens: int, guarded: bool) -> str:
    """The answer of a plain ``generate``."""
    model, processor = subject.loaded.model, subject.loaded.processor
    inputs = encode(subject.loaded, [query.text], [query.image])
    options: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": False}
    if guarded:
        with subject.artifact.attach(model, processor):
            out = model.generate(**inputs, **options)
    else:
        out = model.generate(**inputs, **options)
    new = out[0, inputs["input_ids"].shape[1] :]
    return str(processor.tokenizer.decode(new, skip_special_tokens=True))


# -- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", [None, PICTURE])
def test_both_answers_are_those_of_the_model(subject: Subject, image: Image.Image | None) -> None:
    query = Query("What is this?", image)
    events = events_of(subject, query)
    unguarded, guarded = (own_answer(subject, query, 6, on) for on in (False, True))
    assert text_of(events, "unguarded") == unguarded
    assert text_of(events, "guarded") == guarded
    assert unguarded != guarded  # the text gate is open


def test_the_verdict_comes_first_and_both_answers_end(subject: Subject) -> None:
    events = events_of(subject, Query("What is this?", PICTURE))
    assert isinstance(events[0], Decided)
    assert events[0].decision.by_text and not events[0].decision.by_vlm
    assert [event for event in events if isinstance(event, SideDone)] == [
        SideDone(side, cut=True) for side in SIDES
    ]


def test_states_are_those_of_both_passes(subject: Subject) -> None:
    model, query = subject.loaded.model, Query("What is this?", PICTURE)
    first = events_of(subject, query)[0]
    assert isinstance(first, Decided) and first.as_text is not None
    for state, image in ((first.as_asked, PICTURE), (first.as_text, None)):
        inputs = encode(subject.loaded, [query.text], [image])
        with torch.inference_mode():
            states = model(**inputs, output_hidden_states=True).hidden_states
        wanted = states[4][0, -1]  # 0 is the embedding: after layer 3
        torch.testing.assert_close(state, wanted, atol=1e-4, rtol=1e-3)


def test_stopping_ends_the_answers(subject: Subject) -> None:
    flag = Flag()
    found: list[Event] = []

    def tell(event: Event) -> None:
        found.append(event)
        if isinstance(event, Decided):
            flag.set()

    Answerer(subject.loaded, subject.artifact, 50).answer(Query("x", None), tell, flag)
    assert [event.side for event in found if isinstance(event, SideDone)] == ["unguarded"]
    assert len(text_of(found, "unguarded")) < 10


def test_the_desk_answers_one_request_at_a_time(subject: Subject) -> None:
    answerer = Answerer(subject.loaded, subject.artifact, 4)
    desk = Desk(answerer, AnchorMap.of(torch.randn(2, 9, tiny.WIDTH), 3), "m", "g")
    order: list[str] = []

    async def ask(name: str) -> None:
        async for _ in desk.ask(Query(name, None), Flag()):
            order.append(name)

    async def both() -> None:
        await asyncio.gather(ask("first"), ask("second"))

    asyncio.run(both())
    assert order == sorted(order) and len(set(order)) == 2
    assert not desk.busy


def test_an_error_reaches_the_asker_and_frees_the_desk(subject: Subject) -> None:
    answerer = Answerer(subject.loaded, subject.artifact, 4)
    desk = Desk(answerer, AnchorMap.of(torch.randn(2, 9, tiny.WIDTH), 3), "m", "g")

    async def ask() -> None:
        async for _ in desk.ask(Query("x", None), Flag()):
            pass

    with (
        subject.artifact.attach(subject.loaded.model),  # in the way
        pytest.raises(SafeguardError, match="already attached"),
    ):
        asyncio.run(ask())
    assert not desk.busy


# -- anchors and plots ---------------------------------------------------------------------------


def test_the_map_is_recorded_once(subject: Subject, own_cache: Path) -> None:
    first = anchor_map(subject.loaded, subject.artifact, 3, QUIET)
    (kept,) = (own_cache / "playground").iterdir()
    assert first.points.shape == (2, len(anchors()), 2)
    written = kept.stat().st_mtime_ns
    torch.testing.assert_close(
        anchor_map(subject.loaded, subject.artifact, 3, QUIET).points, first.points
    )
    assert kept.stat().st_mtime_ns == written
    kept.write_bytes(b"damaged")
    again = anchor_map(subject.loaded, subject.artifact, 3, QUIET)
    torch.testing.assert_close(again.points, first.points)


def test_the_map_is_a_principal_component_analysis() -> None:
    states = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(0))
    states[0] += 3
    made = AnchorMap.of(states, 1)
    flat = states.double().flatten(0, 1)
    variances = torch.linalg.eigvalsh(torch.cov(flat.T)).flip(0)
    torch.testing.assert_close(made.points.flatten(0, 1).var(0), variances[:2])
    assert made.shares[0] == pytest.approx(float(variances[0] / variances.sum()))
    assert made.points[0, :, 0].mean() > made.points[1, :, 0].mean()
    assert made.place(states[1, 4]) == pytest.approx(tuple(made.points[1, 4].tolist()), abs=1e-5)


def test_bars_are_scores_and_what_each_layer_adds() -> None:
    """The threshold of a sum is shared out among its layers, wherever the guard's file holds it."""
    text = tiny.gate("text", 1, 2).model_copy(update={"thresholds": [6.0, 0.0]})
    gates = [text, tiny.gate("vlm", 3, 4, per_layer=True)]
    # Of the text gate the layers score 4 and 5.5 before the threshold, and refusal signs add 0.25.
    parts = {"text.0": [-2.0, 5.5, 0.25], "vlm.1": [-1.0, math.nan]}
    scores = {"text.0": [3.75], "vlm.1": parts["vlm.1"]}
    rows = bars(gates, Decision(True, True, False, scores, parts))
    assert [(row.label, row.score, row.decides) for row in rows] == [
        (gate_title(text), 3.75, True),
        ("layer 1", 1.0, False),
        ("layer 2", 2.5, False),
        ("refusal signs", 0.25, False),
        (f"{gate_title(gates[1])}: layer 3", -1.0, True),
    ]


def test_plots_are_svg_in_the_colours_of_the_page(subject: Subject) -> None:
    first = events_of(subject, Query("What is this?", PICTURE))[0]
    assert isinstance(first, Decided)
    made = AnchorMap.of(torch.randn(2, 9, tiny.WIDTH), 3)
    for text in (
        plot_scores(subject.artifact.config.gates, first.decision),
        plot_map(made, None),
        plot_map(made, first),
    ):
        assert ElementTree.fromstring(text).tag.endswith("svg")
        assert "var(--harmful)" in text and "var(--ink)" in text and "#222222" not in text


def test_the_verdict_in_words() -> None:
    def say(by_text: bool, by_vlm: bool) -> str:
        return verdict(Decision(by_text or by_vlm, by_text, by_vlm, {}, {}))

    assert say(False, False).startswith("No gate opened")
    assert "the text gate" in say(True, False) and "VLM" not in say(True, False)
    assert "the gate in the VLM" in say(False, True)
    assert "text gate" in say(True, True) and "gate in the VLM" in say(True, True)


def test_examples_are_questions_of_the_evaluation_sets() -> None:
    known = {p.prompt: p.label for kind in ("malicious", "picture") for p in evaluation(kind)}
    made = examples()
    assert len(made) == 5
    for example in made:
        assert example.title.lower().startswith(known[example.query.text])
        assert (example.query.image is None) == ("text only" in example.title)


# -- loopback only -------------------------------------------------------------------------------


def test_other_hosts_and_taken_ports_are_refused() -> None:
    assert not {"0.0.0.0", "192.168.0.1", "::"} & set(LOOPBACK)
    with listen("127.0.0.1", 0) as taken, pytest.raises(SafeguardError, match="--port"):
        listen("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize(
    ("kind", "host", "origin", "allowed"),
    [
        ("http", "127.0.0.1:8080", None, True),
        ("http", "localhost:8080", "http://localhost:8080", True),
        ("websocket", "[::1]:8080", "http://[::1]:8080", True),
        ("http", "evil.example", None, False),
        ("http", "", None, False),
        ("websocket", "127.0.0.1:8080", "http://evil.example", False),
        ("websocket", "127.0.0.1:8080", "http://127.0.0.1:9", False),
        ("websocket", "127.0.0.1:8080", "null", False),
    ],
)
def test_who_may_ask(kind: str, host: str, origin: str | None, allowed: bool) -> None:
    reached: list[str] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["type"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"host", host.encode())]
    if origin is not None:
        headers.append((b"origin", origin.encode()))
    asyncio.run(LoopbackOnly(inner)({"type": kind, "headers": headers}, send, send))
    assert bool(reached) == allowed
    if allowed:
        assert b"content-security-policy" in dict(sent[0]["headers"])
    else:
        assert sent[0].get("status", sent[0].get("code")) in (403, 1008)


# -- the command ---------------------------------------------------------------------------------


def fails(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["playground", *arguments, "--quiet"])
    assert isinstance(done.exception, SafeguardError)
    return str(done.exception)


def test_errors_of_the_command(subject: Subject, tmp_path: Path) -> None:
    pytest.importorskip("nicegui")
    model = str(subject.model)
    assert "name a guard" in fails(model)
    assert "not loopback" in fails("--host", "192.168.0.1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "--port" in fails("--port", str(taken.getsockname()[1]))
    tiny.always(tiny.llava(seed=7)).save_pretrained(tmp_path / "other")
    assert "this guard is for" in fails(model, "--guard", str(tmp_path / "other"), "--port", "0")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == "nicegui" or name.endswith("playground.serve"):
            raise ModuleNotFoundError(f"No module named {name!r}", name="nicegui")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "vlm-safeguard[playground]" in fails()
