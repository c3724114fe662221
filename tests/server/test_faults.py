"""Faults on purpose. Each ends in a clear error or none, and nothing is served unguarded."""

import ctypes
import errno
import json
import threading
import time

import pytest
import torch
from PIL import Image

from tests import checkpoint, tiny
from tests.server.attacks.pictures import part, png, uri
from tests.server.live import serving, wait_until
from tests.server.raw import chat_bytes
from vlm_safeguard.errors import GuardRuntimeError, UnreadableText
from vlm_safeguard.model.residual_stream import find_decoder
from vlm_safeguard.model.text_reader import TextReader
from vlm_safeguard.server import audit, completions, picture_count, transformers_engine
from vlm_safeguard.server.audit import AuditLog, entries
from vlm_safeguard.server.batch_progress import BatchProgress
from vlm_safeguard.server.conversation import Conversation
from vlm_safeguard.server.http_errors import RequestError
from vlm_safeguard.server.job import Job, Sampling
from vlm_safeguard.server.self_check import SelfCheck


@pytest.fixture
def live(folder, tmp_path, request):
    """A server of its own, because it is broken. It never serves a token unguarded."""
    chosen = {"deadline": 10.0} | getattr(request, "param", {})
    with serving(folder, tmp_path / "audit.jsonl", **chosen) as server:
        yield server
        assert server.witness.unguarded == 0


@pytest.fixture
def layers(live):
    return find_decoder(live.engine.loaded.model).layers


def assert_failed(answer, status=500):
    """An error of ours, and no text."""
    assert answer.status_code == status
    kind = {500: "guard_failed", 503: "not_ready"}[status]
    assert answer.json()["error"]["type"] == kind
    assert answer.headers["x-safeguard-status"] == "failed"
    assert "choices" not in answer.json()


def is_ready(live) -> bool:
    return live.client.get("/ready").status_code == 200


def frames(live, **fields):
    """Data of every frame of a stream, and what stood behind the last."""
    with live.client.stream(
        "POST",
        "/v1/chat/completions",
        content=chat_bytes(stream=True, **fields),
        headers={"content-type": "application/json"},
    ) as answer:
        if answer.status_code != 200:
            answer.read()
            return [answer.json()]
        return [
            line[6:] if line[6:] == "[DONE]" else json.loads(line[6:])
            for line in answer.iter_lines()
            if line.startswith("data: ")
        ]


def together(live, contents, **fields):
    """Answers to requests that share a batch, in order."""
    found = [None] * len(contents)
    take = live.engine._next

    def whole():
        waiting = list(live.engine._waiting)
        first = bool(waiting) and waiting[0].sampling.max_tokens == 1
        return first or len(waiting) == len(contents) or live.engine._closing

    def take_all():
        wait_until(whole)
        return take()

    live.engine._next = take_all
    live.chat(max_tokens=1)  # the thread may already wait in the engine's own

    def ask(place):
        found[place] = live.chat(contents[place], **fields)

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(contents))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    live.engine._next = take
    return found


def content_of(answer) -> str:
    return answer.json()["choices"][0]["message"]["content"]


def after_steps(number, act):
    """A hook for a layer that calls ``act`` once, at the decoding step ``number``."""
    seen = 0

    def hook(module, args, output):
        nonlocal seen
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        if hidden.shape[1] == 1:
            seen += 1
            if seen == number:
                return act(output)
        return None

    return hook


def spoiled(output, row=slice(None)):
    hidden = output if isinstance(output, torch.Tensor) else output[0]
    changed = hidden.clone()
    changed[row] = torch.nan
    return changed if isinstance(output, torch.Tensor) else (changed, *output[1:])


def test_nan_in_the_prompt_blocks(live, layers):
    handle = layers[1].register_forward_hook(lambda module, args, output: spoiled(output))
    assert_failed(live.chat())
    handle.remove()
    assert wait_until(lambda: live.chat().status_code == 200)


def test_nan_while_answering_ends_the_stream_with_an_error(live, layers):
    layers[5].register_forward_hook(after_steps(5, spoiled))
    told = frames(live, max_tokens=30)
    assert told[-1]["error"]["type"] == "guard_failed"
    assert "[DONE]" not in told
    # The prompt gave the first token, four steps gave one each, and the fifth gives none.
    assert sum("choices" in one for one in told) <= 1 + 5


def test_nan_in_one_row_leaves_the_others_alone(live, layers):
    asked = [f"question {number}" for number in range(4)]
    alone = [content_of(live.chat(one, max_tokens=12)) for one in asked]
    layers[5].register_forward_hook(after_steps(4, lambda output: spoiled(output, 2)))
    answers = together(live, asked, max_tokens=12)
    failed = [answer for answer in answers if answer.status_code != 200]
    assert len(failed) == 1
    assert_failed(failed[0])
    for answer, text in zip(answers, alone, strict=True):
        assert answer.status_code != 200 or content_of(answer) == text


@pytest.mark.parametrize(
    "error",
    [RuntimeError("secret /root/x 0xdeadbeef"), MemoryError(), torch.OutOfMemoryError("CUDA"),
     KeyError("x"), RecursionError(), AssertionError()],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_an_exception_inside_a_hook(live, layers, error):
    def fail(module, args, output):
        raise error

    handle = layers[3].register_forward_hook(fail)
    answer = live.chat()
    assert_failed(answer)
    assert "secret" not in answer.text
    assert wait_until(lambda: not is_ready(live))  # the self-check meets it too
    assert_failed(live.chat(), 503)
    assert live.client.get("/health").status_code == 200  # the thread lives
    handle.remove()


def test_a_layer_that_puts_out_no_stream_is_a_failure_and_no_wrong_request(live, layers):
    layers[2].register_forward_hook(
        lambda module, args, output: None or torch.ones(1), prepend=True
    )
    assert_failed(live.chat())


def test_hooks_removed(live, layers):
    for layer in layers:
        layer._forward_hooks.clear()
    assert_failed(live.chat())
    assert wait_until(lambda: not is_ready(live))
    assert_failed(live.chat(), 503)


def test_hooks_removed_in_the_middle(live, layers):
    def remove(output):
        for layer in layers:
            layer._forward_hooks.clear()

    layers[5].register_forward_hook(after_steps(3, remove))
    told = frames(live, max_tokens=30)
    assert told[-1]["error"]["type"] == "guard_failed"
    assert "[DONE]" not in told
    assert wait_until(lambda: not is_ready(live))


def test_forward_replaced(live):
    model = live.engine.loaded.model
    model.forward = type(model).forward.__get__(model)
    assert_failed(live.chat())


def test_forward_replaced_in_the_middle(live, layers):
    """Later tokens come from a function that never asks the decoder."""
    model = live.engine.loaded.model

    def other(*args, **kwargs):
        logits = torch.zeros(len(kwargs["input_ids"]), 1, 260)
        logits[..., 90] = 1.0
        return type(last[0])(logits=logits, past_key_values=kwargs.get("past_key_values"))

    last = []
    own = model.forward

    def first(*args, **kwargs):
        last[:] = [own(*args, **kwargs)]
        model.forward = other
        return last[0]

    model.forward = first
    told = frames(live, max_tokens=30)
    assert told[-1]["error"]["type"] == "guard_failed"
    assert "[DONE]" not in told
    said = "".join(
        one["choices"][0]["delta"].get("content", "") for one in told if "choices" in one
    )
    assert len(said) <= 1  # the first token, which was guarded
    # The self-check that follows a failure finds the replaced forward too.
    assert wait_until(lambda: not live.engine.ready.is_set())
    model.forward = own
    assert live.witness.unguarded >= 1  # they left the model, and were not served
    live.witness.reset()


@pytest.mark.parametrize("live", [{"check_every": 0.1}], indirect=True)
def test_steering_switched_off_is_found(live):
    """The hooks run and change nothing: only the self-check can see it."""
    session = live.engine._session
    own = session._steerer.steer
    session._steerer.steer = lambda *_: None
    assert wait_until(lambda: not is_ready(live))
    assert_failed(live.chat(), 503)
    session._steerer.steer = own
    assert wait_until(lambda: is_ready(live))
    live.witness.reset()  # the self-check asked its own question without steering
    assert live.chat().status_code == 200


@pytest.mark.parametrize("error", [MemoryError("secret"), torch.OutOfMemoryError("secret")])
def test_no_memory_for_a_batch(live, monkeypatch, error):
    """A batch that does not fit is answered one by one."""
    generate = live.engine._generate

    def small(jobs):
        if len(jobs) > 1:
            raise error
        generate(jobs)

    monkeypatch.setattr(live.engine, "_generate", small)
    asked = [f"question {number}" for number in range(3)]
    for answer in together(live, asked):
        assert answer.status_code == 200


def test_one_bad_request_leaves_its_batch_alone(live):
    asked = ["question", "a" * 1500, "another question"]  # the second has too many tokens
    alone = [content_of(live.chat(asked[0])), None, content_of(live.chat(asked[2]))]
    answers = together(live, asked)
    assert [answer.status_code for answer in answers] == [200, 400, 200]
    assert [content_of(answers[0]), None, content_of(answers[2])] == alone


@pytest.mark.parametrize("live", [{"max_prompt_tokens": 10_000}], indirect=True)
def test_a_prompt_longer_than_the_positions_is_a_wrong_request(live):
    answers = together(live, ["question", "a" * 2100, "another question"])  # there are 2048
    assert [answer.status_code for answer in answers] == [200, 400, 200]
    assert "positions, and the model has 2048" in answers[1].json()["error"]["message"]
    assert is_ready(live)


@pytest.mark.parametrize("live", [{"max_prompt_tokens": 10_000}], indirect=True)
def test_an_answer_of_default_length_ends_with_the_positions(live):
    """One of a length that was asked for is refused."""
    around = live.chat("a", max_tokens=1).json()["usage"]["prompt_tokens"] - 1
    content = "a" * (2048 - around - 3)
    answer = live.chat(content, max_tokens=None).json()
    assert answer["usage"]["completion_tokens"] == 4  # the last takes no position
    assert answer["choices"][0]["finish_reason"] == "length"
    assert live.chat(content, max_tokens=5).status_code == 400


def test_a_template_that_refuses_is_a_wrong_request(live):
    processor = live.engine.loaded.processor
    processor.chat_template = "{{ raise_exception('secret') }}"
    answer = live.chat(messages=[{"role": "user", "content": "a"}] * 2)
    assert answer.status_code == 400
    assert "secret" not in answer.text
    assert "template" in answer.json()["error"]["message"]


def test_a_text_that_the_gate_cannot_read_is_a_wrong_request(live, monkeypatch):
    """Alone in its batch or not: the others are answered."""
    read = TextReader.other_form

    def other_form(reader, ids):
        if "hidden" in reader._decoded(ids):
            raise UnreadableText("secret")
        return read(reader, ids)

    monkeypatch.setattr(TextReader, "other_form", other_form)
    answers = together(live, ["question", "a hidden token", "another question"])
    assert [answer.status_code for answer in answers] == [200, 400, 200]
    assert "hide a control token" in answers[1].json()["error"]["message"]
    assert "secret" not in answers[1].text


def test_after_a_fault_the_guard_is_looked_at_before_the_batch_is_tried_again(live, monkeypatch):
    tried = []
    generate = live.engine._generate

    def fail(jobs):
        tried.append(len(jobs))
        if len(jobs) > 1:
            raise RuntimeError("secret")
        generate(jobs)

    def broken(*_):
        raise GuardRuntimeError("the guard is broken")

    monkeypatch.setattr(live.engine, "_generate", fail)
    run = SelfCheck.run
    monkeypatch.setattr(SelfCheck, "run", broken)
    for answer in together(live, ["one question", "a question"]):
        assert answer.status_code in (500, 503)
    assert tried == [1, 2]  # `together` asks one alone at first
    assert live.client.get("/ready").status_code == 503
    monkeypatch.setattr(SelfCheck, "run", run)


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_of_the_server_itself_tells_nothing(live, monkeypatch, caplog, stream):
    """Neither the answer nor the log has the exception's text, which may quote the request."""

    def fail(*_):
        raise RuntimeError("secret")

    monkeypatch.setattr(live.engine, "submit", fail)
    answer = live.chat("hi", headers={"X-Request-Id": "mine"}, stream=stream)
    assert_failed(answer)
    assert answer.headers["x-request-id"] == "mine"
    assert "secret" not in answer.text + caplog.text
    assert "unexpected error" in caplog.text


def test_a_fault_in_the_middle_of_a_stream_is_an_error_frame(live, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("secret")

    monkeypatch.setattr(completions.Answer, "chunk", fail)
    monkeypatch.setattr(completions.Answer, "first", lambda self: {"choices": []})
    told = frames(live)
    assert told[-1]["error"]["type"] == "guard_failed" and "[DONE]" not in told
    assert "secret" not in json.dumps(told) + caplog.text


def kill(thread) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)
    )


def test_the_inference_thread_dies_while_answering(live):
    """Who waits is told at once, and not at the deadline."""
    told = []
    thread = threading.Thread(target=lambda: told.append(live.chat(max_tokens=900)))
    thread.start()
    assert wait_until(lambda: live.engine.busy)
    started = time.monotonic()
    kill(live.engine._thread)
    thread.join(9)
    assert time.monotonic() - started < 5
    assert_failed(told[0], 503)
    assert live.client.get("/health").status_code == 503
    assert live.client.get("/ready").status_code == 503
    assert_failed(live.chat(), 503)


def test_the_inference_thread_dies_while_idle(live):
    kill(live.engine._thread)
    with live.engine._changed:
        live.engine._changed.notify_all()
    assert wait_until(lambda: not live.engine.alive)
    assert_failed(live.chat(), 503)
    assert live.client.get("/health").json() == {"status": "dead"}


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device: /var/secret")


def test_a_full_disk_withholds_answers(live, monkeypatch):
    monkeypatch.setattr(AuditLog, "write", full)
    answer = live.chat()
    assert_failed(answer, 503)
    assert "secret" not in answer.text and "audit log" in answer.text
    told = frames(live)
    assert told[-1]["error"]["type"] == "not_ready" and "[DONE]" not in told
    counts = live.client.get("/metrics").text
    assert 'requests_total{endpoint="chat",mode="enforce",outcome="failed"} 2.0' in counts
    assert 'outcome="answered"' not in counts
    monkeypatch.undo()
    assert live.chat().status_code == 200


def test_half_a_line_does_not_spoil_the_log(tmp_path, monkeypatch):
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.write({"time": "1"})
    with path.open("ab") as file:  # the process died in the middle of a line
        file.write(b'{"time": "2", "outc')
    log = AuditLog(path)
    log.write({"time": "3"})
    assert [one["time"] for one in entries(path)] == ["1", "3"]

    class Short:  # a disk on which half a line has room
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            return self.file.write(data[: len(data) // 2])

    own = audit._open
    monkeypatch.setattr(audit, "_open", lambda path: Short(own(path)))
    with pytest.raises(OSError, match="cut short"):
        log.write({"time": "4"})
    monkeypatch.undo()
    log.write({"time": "5"})
    assert [one["time"] for one in entries(path)] == ["1", "3", "5"]


@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_a_clock_that_jumps(live, monkeypatch, jump):
    """While an answer is being made: deadlines are of another clock."""
    now, own, tokens = time.time, BatchProgress.__call__, []

    def call(*args, **kwargs):
        tokens.append(1)
        return own(*args, **kwargs)

    monkeypatch.setattr(BatchProgress, "__call__", call)
    monkeypatch.setattr(time, "time", lambda: now() + (jump if len(tokens) > 2 else 0))
    assert live.chat(max_tokens=8).json()["usage"]["completion_tokens"] == 8
    assert is_ready(live)


def test_a_thread_that_is_stuck_is_not_healthy(live, monkeypatch):
    """A batch ends by its deadline, and a self-check follows."""
    assert live.client.get("/health").status_code == 200
    monkeypatch.setattr(live.engine, "_due", time.monotonic() - live.engine.settings.deadline - 99)
    for path in ("/health", "/ready"):
        assert live.client.get(path).status_code == 503
    assert_failed(live.chat(), 503)
    monkeypatch.undo()
    assert live.chat().status_code == 200


def without_pixels(inputs):
    del inputs["pixel_values"]


def without_image_tokens(inputs):
    inputs["input_ids"][inputs["input_ids"] == tiny.IMAGE] = tiny.PAD


def without_those_of_one(inputs):
    inputs["input_ids"][0][inputs["input_ids"][0] == tiny.IMAGE] = tiny.PAD


PICTURED = [{"type": "text", "text": "what is it?"}, part(uri(png()))]


def assert_lost(answer):
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "image_lost"
    assert answer.json()["safeguard"]["status"] == "failed"


@pytest.mark.parametrize("lose", [without_pixels, without_image_tokens, without_those_of_one])
def test_a_picture_that_the_processor_loses_is_an_error(live, monkeypatch, lose):
    own = transformers_engine.prepare

    def prepare(*args):
        inputs = own(*args)
        lose(inputs)
        return inputs

    monkeypatch.setattr(transformers_engine, "prepare", prepare)
    assert_lost(live.chat(PICTURED))
    assert live.witness.guarded == 0
    assert "guard_failures_total 1.0" in live.client.get("/metrics").text


def test_a_picture_that_the_template_loses_is_an_error(live, monkeypatch):
    """The one of an earlier turn."""
    template = "{% for message in messages[-1:] %}" + checkpoint.TEMPLATE.split("%}", 1)[1]
    monkeypatch.setattr(live.engine.loaded.processor, "chat_template", template)
    turns = [{"role": role, "content": "hi"} for role in ("user", "assistant", "user")]
    turns[0]["content"] = PICTURED
    assert live.chat(messages=turns).status_code == 400  # this processor counts them too
    assert live.witness.guarded == 0
    processor = live.engine.loaded.processor
    picture = {"type": "image", "image": Image.new("RGB", (24, 24))}
    messages = [turns[0] | {"content": [picture]}, *turns[1:]]
    asked = Job(Conversation(messages, 1), Sampling(1), 0.0, lambda _: None)
    with pytest.raises(RequestError, match="did not reach the model"):
        picture_count.count(processor, "<image>", asked)


@pytest.mark.parametrize("live", [{"check_every": 0.1}], indirect=True)
def test_a_self_check_that_fails_and_passes_again(live, monkeypatch):
    def fail(*_):
        raise RuntimeError("secret")

    monkeypatch.setattr(SelfCheck, "run", fail)
    assert wait_until(lambda: not is_ready(live))
    assert live.client.get("/health").status_code == 200
    answer = live.chat()
    assert_failed(answer, 503)
    assert answer.headers["retry-after"] == "30"
    monkeypatch.undo()
    assert wait_until(lambda: is_ready(live))
    assert live.chat().status_code == 200
    assert "self_check_failures_total" in live.client.get("/metrics").text
