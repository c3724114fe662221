"""Requests from several threads, and calls that are interrupted."""

import threading
import time

import pytest
import torch
from transformers import (
    DynamicCache,
)

from tests import tiny
from tests.reference import CLOSE, holds
from tests.runtime.threads import Stops, in_thread
from tests.tiny import always, generate
from vlm_safeguard.errors import GuardRuntimeError
from vlm_safeguard.model.residual_stream import find_decoder


def test_attached_in_one_thread_used_in_another(model, mixed):
    made, references = mixed
    with made.attach(model):
        thread, box = in_thread(generate, model, tiny.batch(tiny.PROMPTS))
        thread.join()
        holds(references, *box[0])
        holds(references, *generate(model, tiny.batch(tiny.PROMPTS)))


@pytest.mark.parametrize("call", ["generate", "forward", "decoding"])
def test_a_call_beside_a_generation_waits_for_its_turn(model, mixed, call):
    made, references = mixed
    inputs = [tiny.batch(tiny.PROMPTS[row : row + 1]) for row in range(2)]
    streamer = Stops()
    with made.attach(model), torch.no_grad():
        cache = DynamicCache()
        model(**inputs[1], past_key_values=cache)
        thread, box = in_thread(generate, model, inputs[0], streamer=streamer)
        assert streamer.there.wait(10)
        waiting = threading.Timer(0.2, streamer.go.set)
        waiting.start()
        if call == "generate":
            holds(references[1:2], *generate(model, inputs[1]))
        elif call == "forward":
            logits = model(**inputs[1]).logits[0]
            torch.testing.assert_close(logits, references[1].logits([]), **CLOSE)
        else:  # the request that this thread began goes on behind the other's
            logits = model(input_ids=torch.tensor([[7]]), past_key_values=cache).logits[0]
            torch.testing.assert_close(logits[-1], references[1].logits([7])[-1], **CLOSE)
        assert streamer.go.is_set()
        thread.join()
    holds(references[:1], *box[0])


@pytest.mark.parametrize("part", ["the decoder", "the model's forward"])
@pytest.mark.parametrize("threshold", [-1e9, 1e9])
def test_another_thread_does_not_get_into_the_middle_of_a_call(model, threshold, part):
    """In the middle the hooks work, or let everything pass: but not for somebody else."""
    made, inputs = always(model, threshold), tiny.batch(tiny.PROMPTS[:1])
    ids = torch.tensor([tiny.words(8, 5)])
    calls, begun = [], []

    def beside(*_):
        calls.append(1)
        if len(calls) in (2, 4):  # the prompt (after the text-only pass), and a decoding step
            called = model.model.language_model if part == "the decoder" else model.forward
            begun.append(in_thread(called, input_ids=ids))
            begun[-1][0].join(None if part == "the decoder" else 0.1)

    with made.attach(model):
        expected = generate(model, inputs)
        alone = model(input_ids=ids).logits
        handle = find_decoder(model).layers[1].mlp.register_forward_hook(beside)
        try:
            undisturbed = generate(model, inputs)
        finally:
            handle.remove()
            for thread, _ in begun:
                thread.join()
    torch.testing.assert_close(undisturbed[1], expected[1])
    assert len(begun) == 2
    for _, (found,) in begun:
        if part == "the decoder":
            assert isinstance(found, GuardRuntimeError)
        else:  # it had waited
            torch.testing.assert_close(found.logits, alone)


def test_decisions_are_those_of_the_thread_that_reads_them(model, mixed):
    made, references = mixed
    fired = [r.fired for r in references]
    rows = [fired.index(True), fired.index(False)]
    both = threading.Barrier(2)

    def work(session, row):
        generate(model, tiny.batch([tiny.PROMPTS[row]]), max_new_tokens=1)
        both.wait(10)  # and the other thread has called in between
        return session.decisions, session.attestation

    with made.attach(model) as session:
        threads = [in_thread(work, session, row) for row in rows]
        for thread, _ in threads:
            thread.join()
        for row, (_, [(decisions, told)]) in zip(rows, threads, strict=True):
            assert [d.fired for d in decisions] == [fired[row]]
            assert [r.decision for r in told.rows] == decisions
        with pytest.raises(GuardRuntimeError, match="several others did"):
            _ = session.decisions  # this one has made no call
        with pytest.raises(GuardRuntimeError, match="several others did"):
            _ = session.attestation
        generate(model, tiny.batch(tiny.PROMPTS[:3]), max_new_tokens=1)
        in_thread(generate, model, tiny.batch(tiny.PROMPTS[:1]), max_new_tokens=1)[0].join()
        assert [d.fired for d in session.decisions] == fired[:3]


def test_decisions_of_the_only_thread_that_calls_may_be_read_in_another(model, mixed):
    made, references = mixed
    with made.attach(model) as session:
        in_thread(generate, model, tiny.batch(tiny.PROMPTS), max_new_tokens=1)[0].join()
        assert [d.fired for d in session.decisions] == [r.fired for r in references]
        assert len(session.attestation.rows) == len(references)


def test_a_call_that_waits_while_the_guard_goes_is_not_let_through(model, mixed):
    made, _ = mixed
    streamer, inputs = Stops(), tiny.batch(tiny.PROMPTS[:1])
    session = made.attach(model)
    first, _ = in_thread(generate, model, inputs, streamer=streamer)
    assert streamer.there.wait(10)
    leaving, _ = in_thread(session.detach)
    time.sleep(0.1)
    late = [in_thread(generate, model, inputs), in_thread(model.forward, **inputs)]
    time.sleep(0.1)
    streamer.go.set()
    for thread, _ in ((first, 0), (leaving, 0), *late):
        thread.join(10)
    assert all("detached" in str(box[0]) for _, box in late)


def test_a_forward_called_by_itself_is_guarded_and_leaves_the_turn_free(model, mixed):
    made, references = mixed
    inputs = tiny.batch(tiny.PROMPTS)
    with made.attach(model) as session:
        with torch.no_grad():
            called = model(**inputs).logits
            torch.testing.assert_close(model.forward(**inputs).logits, called)
        assert [d.fired for d in session.decisions] == [r.fired for r in references]
        thread, box = in_thread(generate, model, inputs)
        thread.join()
        holds(references, *box[0])


def test_threads_with_a_forward_call_each_get_it(model, mixed):
    made, references = mixed
    inputs = [tiny.batch([prompt]) for prompt in tiny.PROMPTS]
    expected = [reference.logits([]) for reference in references]

    def work(row):
        with torch.no_grad():
            found = [model(**inputs[row]).logits[0] for _ in range(8)]
        return all(torch.allclose(logits, expected[row], **CLOSE) for logits in found)

    with made.attach(model):
        threads = [in_thread(work, row) for row in range(3)]
        for thread, _ in threads:
            thread.join()
    assert [box for _, box in threads] == [[True]] * 3


def test_an_interrupted_call_holds_up_nobody(model, mixed):
    """KeyboardInterrupt passes by the hooks that clean up after an exception."""
    made, references = mixed

    def interrupt(*_):
        raise KeyboardInterrupt

    with made.attach(model):
        handle = find_decoder(model).layers[1].mlp.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**tiny.batch(tiny.PROMPTS))
        handle.remove()
        holds(references, *generate(model, tiny.batch(tiny.PROMPTS)))

    def dies():
        handle = find_decoder(model).layers[1].mlp.register_forward_hook(interrupt)
        try:
            model(**tiny.batch(tiny.PROMPTS))
        except KeyboardInterrupt:
            handle.remove()

    with made.attach(model):
        thread, _ = in_thread(dies)
        thread.join()
        holds(references, *generate(model, tiny.batch(tiny.PROMPTS)))


def test_after_an_interrupted_call_nothing_goes_round_the_guard(model):
    """Ctrl-C in a decoding step of one's own, of a request that was let through."""
    shut = tiny.always(model, 1e9)
    ids, resting = torch.tensor([tiny.words(9, 6)]), threading.Event()

    def interrupt(*_):
        raise KeyboardInterrupt

    def interrupted():
        out = model(**tiny.batch(tiny.PROMPTS[:1]))
        handle = find_decoder(model).layers[1].mlp.register_forward_hook(interrupt)
        try:
            model(input_ids=torch.tensor([[7]]), past_key_values=out.past_key_values)
        except KeyboardInterrupt:
            handle.remove()

    def lives_on():
        interrupted()
        done.set()
        resting.wait(30)

    with torch.no_grad(), shut.attach(model) as session:
        interrupted()
        with pytest.raises(GuardRuntimeError, match="outside"):
            model.model(input_ids=ids)
        model.forward(input_ids=ids)  # another request, from its prompt
        assert [d.fired for d in session.decisions] == [False]
        done = threading.Event()
        thread, _ = in_thread(lives_on)
        assert done.wait(30)
        model(input_ids=ids)  # and the turn was given back
    resting.set()
    thread.join()
    model(input_ids=ids)
    assert "forward" not in vars(model)
