"""Every way of generating gives each row what its prompt gives alone."""

import threading

import pytest
import torch
from PIL import Image
from transformers import (
    GenerationConfig,
    TextIteratorStreamer,
    pipeline,
)

from tests import tiny
from tests.reference import CLOSE, Reference, calibrated, holds
from tests.tiny import NEW, TEXTS, always, generate

# -- ways of choosing tokens -------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": True, "use_cache": False},
        {"generation_config": GenerationConfig(max_new_tokens=NEW, do_sample=True, top_k=0)},
    ],
    ids=["greedy", "sampled", "returned", "no-cache", "config"],
)
def test_greedy_and_sampled(model, mixed, options):
    made, references = mixed
    torch.manual_seed(0)
    if "generation_config" in options:
        options["generation_config"].return_dict_in_generate = True
    with made.attach(model) as session:
        tokens, logits = generate(model, tiny.batch(tiny.PROMPTS), **options)
        copies = options.get("num_return_sequences", 1)
        fired = [r.fired for r in references for _ in range(copies)]
        assert [d.fired for d in session.decisions] == fired
    holds(references, tokens, logits, copies)


@pytest.mark.parametrize(
    ("beams", "returned", "sample"), [(3, 1, False), (3, 2, False), (2, 2, True)]
)
def test_the_scores_of_beams(model, mixed, beams, returned, sample):
    made, references = mixed
    torch.manual_seed(0)
    with made.attach(model):
        out = model.generate(
            **tiny.batch(tiny.PROMPTS),
            max_new_tokens=NEW,
            num_beams=beams,
            num_return_sequences=returned,
            do_sample=sample,
            top_k=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    for row, answer in enumerate(out.sequences[:, -NEW:].tolist()):
        table = references[row // returned].logits(answer[:-1])[-NEW:].log_softmax(-1)
        expected = table[range(NEW), answer].sum() / NEW
        torch.testing.assert_close(out.sequences_scores[row], expected, **CLOSE)


def test_another_architecture():
    model = tiny.onevision()
    made, references = calibrated(model, TEXTS)
    inputs = tiny.batch(TEXTS)
    torch.manual_seed(0)
    with made.attach(model):
        holds(references, *generate(model, inputs, do_sample=True, num_return_sequences=2), 2)
        holds(references, *generate(model, inputs, cache_implementation="static"))
        holds(references, *generate(model, inputs, prefill_chunk_size=3))


# -- streams and pipelines ---------------------------------------------------------------------


def test_a_text_stream_from_a_thread(loaded):
    model, tokenizer = loaded.model, loaded.processor.tokenizer
    made = always(model, tokens=None)
    ids = torch.tensor([tiny.words(0, 6)])
    reference = Reference(model, made, ids[0].tolist())
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1}
    with made.attach(model) as session:
        thread = threading.Thread(
            target=model.generate, kwargs={"inputs": ids, "streamer": streamer, **options}
        )
        thread.start()
        text = "".join(streamer)
        thread.join()
        assert session.decisions[0].fired
    assert text == tokenizer.decode(reference.greedy(NEW)[0])


def test_a_pipeline(loaded):
    model = loaded.model
    made = always(model, tokens=None)
    pipe = pipeline("image-text-to-text", model=model, processor=loaded.processor)
    talk = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": Image.new("RGB", (24, 24), (200, 30, 30))},
                {"type": "text", "text": "What is it?"},
            ],
        }
    ]

    def answer():
        settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1}
        return pipe(text=talk, return_full_text=False, generate_kwargs=settings)

    plain = answer()
    with made.attach(model) as session:
        guarded = answer()
        assert session.decisions[0].fired
        assert session.attestation.rows[0].changed == {2: NEW, 4: NEW}
    assert plain != guarded
    assert answer() == plain


# -- cost --------------------------------------------------------------------------------------


def test_a_step_with_nothing_to_do_only_counts_its_layers(model, monkeypatch):
    """No tensor is touched by the guard where the gate is shut or the dose is over."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Count.calls += 1
            return function(*args, **(kwargs or {}))

    def operations(guarded):
        with torch.no_grad():
            out = model(**tiny.batch(tiny.PROMPTS))
            token = torch.full((len(tiny.PROMPTS), 1), 7)
            with Count():
                Count.calls = 0
                model(input_ids=token, past_key_values=out.past_key_values)
        return Count.calls

    plain = operations(False)
    for threshold, tokens in ((1e9, None), (-1e9, 1)):
        with always(model, threshold, tokens=tokens).attach(model):
            assert operations(True) == plain
