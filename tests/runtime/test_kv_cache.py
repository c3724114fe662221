"""Caches of every kind give each row what its prompt gives alone, or are refused."""

import copy

import pytest
import torch
from transformers import (
    DynamicCache,
    StaticCache,
)

from tests import tiny
from tests.reference import CLOSE, Reference, holds
from tests.tiny import NEW, TEXTS, always, generate
from vlm_safeguard.errors import GuardRuntimeError

# -- caches ------------------------------------------------------------------------------------


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="offloads from CUDA")


@pytest.mark.parametrize(
    "kind",
    [
        "dynamic",
        "static",
        pytest.param("offloaded", marks=needs_cuda),
        pytest.param("offloaded_static", marks=needs_cuda),
    ],
)
def test_caches_by_name(model, mixed, kind):
    made, references = mixed
    with made.attach(model):
        for _ in range(2):  # the second time a static cache's room is reused
            holds(
                references,
                *generate(model, tiny.batch(tiny.PROMPTS), cache_implementation=kind),
            )


def test_a_static_cache_of_the_users_own(model, mixed):
    made, references = mixed
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=40)
    with made.attach(model):
        for _ in range(2):
            out = generate(model, tiny.batch(tiny.PROMPTS), past_key_values=cache)
            holds(references, *out)
            cache.reset()


IN_EIGHTS = {"nbits": 8, "q_group_size": 8, "axis_key": 1, "axis_value": 1, "residual_length": 4}


@pytest.mark.parametrize(
    ("settings", "rounding"),
    [({"backend": "fp8"}, 2.0), ({"backend": "hqq", **IN_EIGHTS}, 0.2)],
    ids=["fp8", "hqq"],
)
def test_a_quantised_cache(model, mixed, settings, rounding):
    """Each row is what its prompt gives alone, up to what rounding the cache does to the logits,
    which is little beside what the guard does."""
    if settings["backend"] == "hqq":
        pytest.importorskip("hqq")
    made, references = mixed
    inputs = tiny.batch(tiny.PROMPTS)
    how = {"cache_implementation": "quantized", "cache_config": settings}
    _, plain = generate(model, inputs, **how)
    with made.attach(model) as session:
        for _ in range(2):
            tokens, logits = generate(model, inputs, **how)
            assert [d.fired for d in session.decisions] == [r.fired for r in references]
            for reference, answer, table, bare in zip(
                references, tokens.tolist(), logits, plain, strict=True
            ):
                expected = reference.logits(answer[:-1])[-NEW:]
                torch.testing.assert_close(table, expected, atol=rounding, rtol=0)
                assert not reference.fired or (table - bare).abs().max() > 2 * rounding


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_a_prefill_in_chunks(model, texts, chunk):
    made, references = texts
    with made.attach(model) as session:
        holds(references, *generate(model, tiny.batch(TEXTS), prefill_chunk_size=chunk))
        assert [d.fired for d in session.decisions] == [r.fired for r in references]


def test_a_forward_call_whose_cache_the_model_made(model, mixed):
    made, references = mixed
    for reference in references[:3]:
        prompt = torch.tensor([reference.prompt])
        with made.attach(model), torch.no_grad():
            out = model(**tiny.batch([reference.prompt]))
            answer, tables = [], [out.logits[:, -1]]
            for _ in range(NEW - 1):
                answer.append(int(tables[-1].argmax()))
                token = torch.tensor([answer[-1:]])
                out = model(input_ids=token, past_key_values=out.past_key_values)
                tables.append(out.logits[:, -1])
        expected = reference.logits(answer)[prompt.shape[1] - 1 :]
        torch.testing.assert_close(torch.cat(tables), expected, **CLOSE)


# -- turns and embeddings ----------------------------------------------------------------------


def test_turns_that_are_sent_whole(model, mixed):
    made, references = mixed
    with made.attach(model):
        for reference in references[:3]:
            tokens, _ = generate(model, tiny.batch([reference.prompt]))
            turn = [*reference.prompt, *tokens[0].tolist(), *tiny.pictured(tiny.words(20, 4))]
            second = Reference(model, made, turn)
            holds([second], *generate(model, tiny.batch([turn])))


@pytest.mark.parametrize("opened", [True, False])
def test_a_turn_on_the_cache_of_the_last(model, opened):
    """Where the last turn was steered its cache is refused, a copy of it too; where it was not,
    it is what the whole conversation gives."""
    made = always(model, -1e9 if opened else 1e9)
    prompt = tiny.words(1, 6)
    with made.attach(model):
        cache = DynamicCache()
        first = model.generate(
            torch.tensor([prompt]), past_key_values=cache, max_new_tokens=NEW, do_sample=False
        )
        turn = [*first[0].tolist(), *tiny.words(2, 5)]
        inputs = {"input_ids": torch.tensor([turn]), "attention_mask": torch.ones(1, len(turn))}
        for held in (copy.deepcopy(cache), cache):
            if opened:
                with pytest.raises(GuardRuntimeError, match="steered states"):
                    generate(model, inputs, past_key_values=held)
            else:
                out = generate(model, inputs, past_key_values=held)
                holds([Reference(model, made, turn)], *out)


# -- refused -----------------------------------------------------------------------------------


def test_guessed_tokens_on_the_cache_are_refused(model):
    """What speculation would look like to the hooks, whatever setting led to it."""

    def speculate(*_, **__):
        cache = DynamicCache()
        ids = torch.tensor([tiny.words(0, 6)])
        model(input_ids=ids, past_key_values=cache)
        model(input_ids=ids[:, :3], past_key_values=cache)

    ids = torch.tensor([tiny.words(0, 6)])
    model.generate = speculate
    try:
        with always(model).attach(model), pytest.raises(GuardRuntimeError, match="guessed"):
            model.generate(ids)
    finally:
        del model.generate


# -- threads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["tuple", "failed"])
def test_a_cache_with_steered_states_is_known_however_it_came_about(model, how):
    prompt = tiny.words(1, 6)
    whole = {"input_ids": torch.tensor([[*prompt, *tiny.words(2, 5)]])}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])

    def out_of_memory(*_):
        raise torch.OutOfMemoryError

    with always(model).attach(model), torch.no_grad():
        if how == "tuple":
            output = model(torch.tensor([prompt]), return_dict=False)
            cache = next(part for part in output if hasattr(part, "get_seq_length"))
        else:
            cache = DynamicCache(config=model.config.get_text_config())
            handle = model.lm_head.register_forward_hook(out_of_memory)
            with pytest.raises(torch.OutOfMemoryError):
                model.generate(torch.tensor([prompt]), past_key_values=cache, max_new_tokens=2)
            handle.remove()
        assert cache.get_seq_length() == len(prompt)
        with pytest.raises(GuardRuntimeError, match="steered states"):
            model.generate(**whole, past_key_values=cache, max_new_tokens=2)
