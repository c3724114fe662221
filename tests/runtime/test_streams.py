"""A reader of a stream is never left waiting, however its generation ends."""

import threading

import pytest
import torch
from transformers import TextIteratorStreamer

from tests import tiny
from tests.runtime.threads import in_thread
from tests.tiny import always
from vlm_safeguard.errors import GuardRuntimeError
from vlm_safeguard.model.residual_stream import find_decoder

WAIT = 20  # seconds; a stream that is not ended raises queue.Empty then
OPTIONS = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}


def read(loaded, ids, **options):
    """The text of a stream that a thread generates, and the result or exception of that."""
    streamer = TextIteratorStreamer(loaded.processor.tokenizer, skip_prompt=True, timeout=WAIT)
    call = OPTIONS | {"inputs": ids, "streamer": streamer} | options
    thread, box = in_thread(loaded.model.generate, **call)
    text = "".join(streamer)
    thread.join(WAIT)
    assert not thread.is_alive()
    return text, box[0]


@pytest.mark.parametrize(
    "refused", [{"penalty_alpha": 0.6}, {"text_input_ids": torch.ones(2, 3).long()}]
)
def test_a_refused_request_ends_its_stream(loaded, refused):
    ids = torch.tensor([tiny.words(0, 6)])
    with always(loaded.model).attach(loaded.model) as session:
        text, error = read(loaded, ids, **refused)
        assert text == "" and isinstance(error, GuardRuntimeError)
        assert session.decisions == []
        text, output = read(loaded, ids)
        assert text == loaded.processor.tokenizer.decode(output[0, ids.shape[1] :])


def test_a_streamer_by_position_is_refused_and_ended(loaded):
    ids = torch.tensor([tiny.words(0, 6)])
    streamer = TextIteratorStreamer(loaded.processor.tokenizer, timeout=WAIT)
    before = [None] * 6  # generate's arguments between the ids and the streamer
    with (
        always(loaded.model).attach(loaded.model),
        pytest.raises(GuardRuntimeError, match="by keyword"),
    ):
        loaded.model.generate(ids, *before, streamer)
    assert "".join(streamer) == ""


def test_a_generate_that_goes_round_the_guard_is_refused_and_ended(loaded):
    model, ids = loaded.model, torch.tensor([tiny.words(0, 6)])
    kept, by_position = model.generate, [None] * 6
    streamer = TextIteratorStreamer(loaded.processor.tokenizer, skip_prompt=True, timeout=WAIT)

    def within(_, scores):
        with pytest.raises(GuardRuntimeError, match="inside generate"):
            type(model).generate(model, ids, streamer=streamer, **OPTIONS)
        assert "".join(streamer) == ""
        return scores

    with always(model).attach(model):
        for call in (
            lambda: type(model).generate(model, ids, streamer=streamer, **OPTIONS),
            lambda: type(model).generate(model, ids, *by_position, streamer),
            lambda: kept(ids, streamer=streamer, **OPTIONS),
        ):
            with pytest.raises(GuardRuntimeError, match="bypasses the guard"):
                call()
            assert "".join(streamer) == ""
        # One within another: its own stream ends, and that of the other goes on.
        whole, _ = read(loaded, ids)
        assert read(loaded, ids, logits_processor=[within])[0] == whole


def test_a_failed_step_ends_its_stream_after_what_came_before(loaded):
    ids = torch.tensor([tiny.words(0, 6)])
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 4:  # the text-only pass, the prompt, a step, and this one
            raise RuntimeError("out of memory")

    with always(loaded.model).attach(loaded.model):
        whole, output = read(loaded, ids)
        handle = find_decoder(loaded.model).layers[1].mlp.register_forward_hook(fail)
        text, error = read(loaded, ids)
        handle.remove()
    assert isinstance(error, RuntimeError) and str(error) == "out of memory"
    assert text == loaded.processor.tokenizer.decode(output[0, ids.shape[1] :][:2])
    assert whole.startswith(text) and len(text) < len(whole)


def test_an_interrupted_generation_ends_its_stream(loaded):
    class Interrupted:
        ended = threading.Event()

        def put(self, _):
            raise KeyboardInterrupt

        def end(self):
            self.ended.set()

    streamer = Interrupted()
    with always(loaded.model).attach(loaded.model), pytest.raises(KeyboardInterrupt):
        loaded.model.generate(torch.tensor([tiny.words(0, 6)]), streamer=streamer, **OPTIONS)
    assert streamer.ended.is_set()


def test_a_streamer_that_cannot_end_does_not_hide_the_error(loaded):
    class Broken:
        def put(self, _):
            pass

        def end(self):
            raise ValueError("closed")

    with (
        always(loaded.model).attach(loaded.model),
        pytest.raises(GuardRuntimeError, match="penalty_alpha"),
    ):
        loaded.model.generate(
            torch.tensor([tiny.words(0, 6)]), streamer=Broken(), penalty_alpha=0.6, **OPTIONS
        )
