"""Requests from several threads, and calls that are interrupted."""

import threading

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
def test_a_call_beside_a_generation_is_refused_and_leaves_it_alone(model, mixed, call):
    made, references = mixed
    inputs = tiny.batch(tiny.PROMPTS[:1])
    streamer = Stops()
    with made.attach(model):
        cache = DynamicCache()
        model(**inputs, past_key_values=cache)
        thread, box = in_thread(generate, model, inputs, streamer=streamer)
        assert streamer.there.wait(10)
        with pytest.raises(GuardRuntimeError, match="another thread"):
            if call == "generate":
                model.generate(**inputs)
            elif call == "forward":
                model(**inputs)
            else:
                model(input_ids=torch.tensor([[7]]), past_key_values=cache)
        streamer.go.set()
        thread.join()
    holds(references[:1], *box[0])


@pytest.mark.parametrize("part", ["the decoder", "the model's forward"])
@pytest.mark.parametrize("threshold", [-1e9, 1e9])
def test_another_thread_is_refused_in_the_middle_of_a_call(model, threshold, part):
    """In the middle the hooks work, or let everything pass: but not for somebody else."""
    made, inputs = always(model, threshold), tiny.batch(tiny.PROMPTS[:1])
    calls, box = [], []

    def beside(*_):
        calls.append(1)
        if len(calls) in (2, 4):  # the prompt (after the text-only pass), and a decoding step
            ids = torch.tensor([tiny.words(8, 5)])
            called = model.model.language_model if part == "the decoder" else model.forward
            thread, got = in_thread(called, input_ids=ids)
            thread.join()
            box.append(got[0])

    with made.attach(model):
        expected = generate(model, inputs)
        handle = find_decoder(model).layers[1].mlp.register_forward_hook(beside)
        try:
            undisturbed = generate(model, inputs)
        finally:
            handle.remove()
    assert len(box) == 2 and all(isinstance(one, GuardRuntimeError) for one in box)
    torch.testing.assert_close(undisturbed[1], expected[1])


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


def test_two_threads_with_a_forward_call_each_get_it_or_an_error(model, mixed):
    made, references = mixed
    inputs = [tiny.batch([prompt]) for prompt in tiny.PROMPTS]
    wrong, refused, right = [], [], []

    def work(row):
        for _ in range(15):
            try:
                with torch.no_grad():
                    logits = model(**inputs[row]).logits
            except GuardRuntimeError as error:
                refused.append(error)
            else:
                close = torch.allclose(logits[0], expected[row], **CLOSE)
                (right if close else wrong).append(row)

    expected = [reference.logits([]) for reference in references]
    with made.attach(model):
        threads = [threading.Thread(target=work, args=(row,)) for row in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert right and not wrong
    assert all("another thread" in str(error) for error in refused)


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
