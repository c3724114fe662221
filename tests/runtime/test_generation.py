"""Every way of generating gives each row what its prompt gives alone, or is refused."""

import copy
import threading
from functools import partial

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    StaticCache,
    TextIteratorStreamer,
    pipeline,
)

from tests import checkpoint, families, tiny
from tests.reference import CLOSE, Reference, calibrated, holds
from tests.tiny import NEW, always, generate
from vlm_safeguard.errors import GuardError, GuardRuntimeError, ModelError
from vlm_safeguard.model.loading import load
from vlm_safeguard.model.residual_stream import find_decoder
from vlm_safeguard.runtime.session import Session
from vlm_safeguard.runtime.steering import Steerer

TEXTS = [tiny.words(seed, 4 + seed) for seed in range(5)]  # prompts without pictures


@pytest.fixture(scope="module")
def mixed(model):
    return calibrated(model, tiny.PROMPTS)


@pytest.fixture(scope="module")
def texts(model):
    return calibrated(model, TEXTS)


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


@pytest.mark.parametrize("when", ["before any request", "after one", "after a refused one"])
@pytest.mark.parametrize("which", ["the class's", "kept", "kept and chunked"])
def test_a_generate_that_goes_round_the_guard_is_refused(model, texts, which, when):
    """It would skip the check of the settings: in chunks, its first would pass for the prompt."""
    made, references = texts
    inputs = tiny.batch(TEXTS)
    kept = type(model).generate.__get__(model) if which == "the class's" else model.generate
    chunk = {"prefill_chunk_size": 3} if "chunked" in which else {}
    seen = []
    with made.attach(model) as session:
        if when != "before any request":
            generate(model, inputs)
        if when == "after a refused one":
            with pytest.raises(GuardRuntimeError, match="leave it out"):
                generate(model, inputs, penalty_alpha=0.6)
        handle = model.lm_head.register_forward_hook(lambda *_: seen.append(1))
        with pytest.raises(GuardRuntimeError, match=r"call model\.generate"):
            kept(**inputs, max_new_tokens=NEW, **chunk)
        handle.remove()
        assert not seen  # nothing ran
        holds(references, *generate(model, inputs))
        assert [d.fired for d in session.decisions] == [r.fired for r in references]
    assert torch.equal(kept(**inputs, max_new_tokens=1), model.generate(**inputs, max_new_tokens=1))


def test_a_generate_of_the_class_inside_a_guarded_one_is_refused(model):
    """Its prompt, as long as the request is then, would pass for one more step of it."""
    ids = torch.tensor([tiny.words(0, 6)])
    longer = torch.tensor([tiny.words(1, 8)])
    with always(model).attach(model):

        def within():
            with pytest.raises(GuardRuntimeError, match="inside generate"):
                type(model).generate(model, longer, max_new_tokens=1, use_cache=False)

        for use_cache in (True, False):
            streamer = _Stops(within)
            model.generate(ids, max_new_tokens=NEW, streamer=streamer, use_cache=use_cache)
            assert streamer.there.is_set()


def test_what_prepares_calls_is_left_as_it_was(model, monkeypatch):
    """Also one of the model's own instance, and after an exception in generate."""

    class Stop(Exception):
        pass

    def stop():
        raise Stop

    own = model.prepare_inputs_for_generation
    ids = torch.tensor([tiny.words(0, 6)])
    with always(model).attach(model):
        kept = model.prepare_inputs_for_generation
        with pytest.raises(Stop):
            model.generate(ids, streamer=_Stops(stop), max_new_tokens=NEW)
    assert "prepare_inputs_for_generation" not in model.__dict__
    kept(ids)  # no guard is on the model any more
    monkeypatch.setattr(model, "prepare_inputs_for_generation", own)
    with always(model).attach(model):
        model.generate(ids, max_new_tokens=2)
    assert model.__dict__["prepare_inputs_for_generation"] is own


def test_what_prepares_calls_cannot_be_taken_away(model, monkeypatch):
    ids = torch.tensor([tiny.words(0, 6)])
    own = model.prepare_inputs_for_generation
    with always(model).attach(model):
        monkeypatch.setattr(model, "prepare_inputs_for_generation", own)
        for call in (model.generate, type(model).generate.__get__(model)):
            with pytest.raises(GuardRuntimeError, match="attach the guard last"):
                call(ids, max_new_tokens=2)
        monkeypatch.undo()
        model.generate(ids, max_new_tokens=2)


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


def _embedded(model, inputs):
    """Embeddings of a batch with its pictures in them."""
    ids = inputs["input_ids"]
    embedded = model.get_input_embeddings()(ids)
    if "pixel_values" in inputs:
        features = torch.cat(list(model.get_image_features(inputs["pixel_values"]).pooler_output))
        embedded = embedded.clone()
        embedded[ids == tiny.IMAGE] = features
    return {"inputs_embeds": embedded.detach(), "attention_mask": inputs["attention_mask"]}


@pytest.mark.parametrize("beams", [1, 2])
def test_embeddings_alone_where_no_text_is_read(model, beams):
    gates = [tiny.gate("vlm", 1, 3)]
    made, references = calibrated(model, tiny.PROMPTS, gates, reference="anchor")
    inputs = _embedded(model, tiny.batch(tiny.PROMPTS))
    with made.attach(model) as session:
        if beams == 1:
            holds(references, *generate(model, inputs))
        else:
            model.generate(**inputs, num_beams=beams, max_new_tokens=NEW)
        copies = beams
        assert [d.fired for d in session.decisions] == [
            r.fired for r in references for _ in range(copies)
        ]


@pytest.mark.parametrize(
    ("source", "steering"),
    [
        ("text", {"reference": "anchor"}),
        ("vlm", {"reference": "text"}),
    ],
)
def test_embeddings_alone_where_the_text_is_read(model, source, steering):
    made = tiny.guard(model, [tiny.gate(source, 2)], **steering)
    inputs = _embedded(model, tiny.batch(tiny.PROMPTS))
    with made.attach(model):
        with pytest.raises(GuardRuntimeError, match="pass input_ids"):
            generate(model, inputs)
        with pytest.raises(GuardRuntimeError, match="pass input_ids"):
            model(**inputs)


def test_embeddings_beside_their_ids(model, mixed):
    made, references = mixed
    inputs = tiny.batch(tiny.PROMPTS)
    both = _embedded(model, inputs) | {"input_ids": inputs["input_ids"]}
    with made.attach(model):
        holds(references, *generate(model, both))


def test_embeddings_that_say_something_else_than_their_ids(model, mixed):
    """The guard would read the ids, the model the embeddings."""
    made, _ = mixed
    inputs = tiny.batch(tiny.PROMPTS)
    both = _embedded(model, inputs) | {"input_ids": inputs["input_ids"].clone()}
    both["input_ids"][0, -1] += 1
    with made.attach(model), pytest.raises(GuardRuntimeError, match="are not those of"):
        generate(model, both)


# -- refused -----------------------------------------------------------------------------------

REFUSED = {
    "prompt_lookup_num_tokens": 2,
    "assistant_early_exit": 2,
    "use_mtp": True,
    "is_assistant": True,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "num_beam_groups": 2,
    "guidance_scale": 2.0,
    "token_healing": True,
    "cache_implementation": "paged",
    "force_words_ids": [[5]],
}


@pytest.mark.parametrize("where", ["argument", "config", "model"])
@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_are_refused(model, monkeypatch, name, where):
    inputs = tiny.batch(tiny.PROMPTS)
    config = GenerationConfig(max_new_tokens=2)
    setattr(config, name, REFUSED[name])
    options = {"max_new_tokens": 2}
    if where == "argument":
        options[name] = REFUSED[name]
    elif where == "config":
        options["generation_config"] = config
    else:
        monkeypatch.setattr(model, "generation_config", config)
    with (
        always(model).attach(model),
        pytest.raises(GuardRuntimeError, match=r"not guarded|second prompt"),
    ):
        model.generate(**inputs, **options)


def test_other_models_and_code_are_refused(model):
    inputs = tiny.batch(tiny.PROMPTS)
    with always(model).attach(model):
        for name, value in {
            "assistant_model": tiny.llava(),
            "custom_generate": lambda *_, **__: None,
            "compile_config": object(),
        }.items():
            with pytest.raises(GuardRuntimeError, match=name):
                model.generate(**inputs, **{name: value})


def test_several_requests_in_one_row_are_refused(model):
    ids = torch.tensor([tiny.words(0, 10)])
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    with always(model).attach(model):
        for packed in (
            {"position_ids": places},
            {"position_ids": torch.stack([places, *[torch.arange(10)[None]] * 3])},  # M-RoPE
            {"cu_seq_lens_q": torch.tensor([0, 4, 10])},
        ):
            with pytest.raises(GuardRuntimeError, match="packed"):
                model(input_ids=ids, **packed)
            with pytest.raises(GuardRuntimeError, match="packed"):
                model.generate(ids, max_new_tokens=2, **packed)


@pytest.mark.parametrize("source", ["text", "vlm"])
@pytest.mark.parametrize("family", [families.qwen2_vl, families.llava_onevision])
def test_videos_are_refused(family, source):
    loaded = family()
    model, token = loaded.model, loaded.model.config.video_token_id
    made = tiny.guard(model, [tiny.gate(source, 2)], layers=[2], reference="anchor")
    ids, pixels = torch.tensor([tiny.words(0, 6)]), torch.randn(8, 24)
    as_token = {"input_ids": torch.cat([torch.tensor([[token] * 4]), ids], 1)}
    as_pixels = {"input_ids": ids, "pixel_values_videos": pixels}
    with made.attach(model), torch.no_grad():
        for video in (as_token, as_pixels):
            with pytest.raises(GuardRuntimeError, match="frames as images"):
                model(**video)
            with pytest.raises(GuardRuntimeError, match="frames as images"):
                model.generate(**video, max_new_tokens=2)
        model(input_ids=ids)


@pytest.mark.parametrize("source", ["text", "vlm"])
def test_sound_is_refused(source):
    model = tiny.llava()
    model.config.audio_token_id = 90
    made = tiny.guard(model, [tiny.gate(source, 2)], layers=[2], reference="anchor")
    ids = torch.tensor([tiny.words(0, 6)])
    as_token = {"input_ids": torch.cat([torch.tensor([[90] * 4]), ids], 1)}
    with made.attach(model), torch.no_grad():
        for name in ("input_features", "input_audio_embeds", "audio_values"):
            for sound in (as_token, {"input_ids": ids, name: torch.randn(1, 8, 16)}):
                with pytest.raises(GuardRuntimeError, match="with sound"):
                    model(**sound)
                with pytest.raises(GuardRuntimeError, match="with sound"):
                    model.generate(**sound, max_new_tokens=2)
        model(input_ids=ids)


def test_padding_without_a_mask_is_taken_as_generate_takes_it_or_refused(model, texts):
    made, references = texts
    ids = tiny.batch(TEXTS)["input_ids"]
    options = {"max_new_tokens": 3, "pad_token_id": 0}
    with made.attach(model) as session:
        model.generate(ids, eos_token_id=1, **options)  # leading padding: sure
        assert [d.fired for d in session.decisions] == [r.fired for r in references]
        right = tiny.batch(TEXTS, "right")["input_ids"]
        inner = ids.clone()
        inner[:, -3] = 0
        for bad, ends in ((right, 1), (inner, 1), (ids, 0), (right, [0, 1])):
            with pytest.raises(GuardRuntimeError, match="without an attention_mask"):
                model.generate(bad, eos_token_id=ends, **options)
            assert session.attestation is None
        for bad in (ids, right):  # a forward call attends to all
            with pytest.raises(GuardRuntimeError, match="without an attention_mask"):
                model(bad)
        whole = torch.ones_like(inner)
        model.generate(inner, attention_mask=whole, eos_token_id=1, **options)


@pytest.mark.parametrize("by_config", [True, False])
def test_generate_does_not_compile_the_model_by_itself(model, monkeypatch, by_config):
    """It would where the cache is static and the device no CPU."""
    asked = []

    def criteria(self, _, config):
        asked.append(config.disable_compile)
        return False

    monkeypatch.setattr(type(model), "_valid_auto_compile_criteria", criteria)
    config = GenerationConfig(max_new_tokens=2, cache_implementation="static")
    options = {"generation_config": config} if by_config else config.to_diff_dict()
    options.pop("transformers_version", None)
    with always(model).attach(model):
        model.generate(**tiny.batch(tiny.PROMPTS), **options)
        model.generate(**tiny.batch(tiny.PROMPTS), **options, disable_compile=False)
    assert asked == [True, True]
    assert config.disable_compile is None


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


# -- streams and pipelines ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder)


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


# -- models of other kinds ---------------------------------------------------------------------


def _parts(model):
    return {
        "model": model,
        "decoder": model.model.language_model,
        "layer": model.model.language_model.layers[1],
        "mlp": model.model.language_model.layers[5].mlp,
        "vision": model.model.vision_tower,
    }


@pytest.mark.parametrize("how", ["in place", "forward"])
@pytest.mark.parametrize("part", ["model", "decoder", "layer", "mlp", "vision"])
def test_what_is_compiled_anywhere_is_refused(part, how):
    model = tiny.llava()
    made, module = always(model), _parts(model)[part]
    if how == "in place":
        module.compile(backend="eager")
    else:
        module.forward = torch.compile(module.forward, backend="eager")
    hooks = dict(model._forward_hooks)
    with pytest.raises(GuardError, match="compiled"), made.attach(model):
        pass
    assert dict(model._forward_hooks) == hooks
    assert "generate" not in model.__dict__


def test_a_compiled_layer_in_place_of_a_layer_is_refused():
    model = tiny.llava()
    made, layers = always(model), find_decoder(model).layers
    layers[3] = torch.compile(layers[3], backend="eager")
    with pytest.raises(GuardError), made.attach(model):  # its parameters' names differ as well
        pass
    with pytest.raises(GuardError, match=r"compiled at .*layers\.3"):
        Session(made.config, made.tensors, made.image_markup, model)


def _compiled(how, model):
    """Compiled around the model: nothing on it tells of that."""
    whole = {
        "model": model,
        "a function that calls it": lambda **inputs: model(**inputs),
        "its forward": model.forward,
        "its class's forward": partial(type(model).forward, model),
    }
    return torch.compile(whole[how], backend="eager")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["model", "a function that calls it"])
def test_compiled_before_and_called_under_guard(how):
    """What was compiled without hooks is compiled anew, with them."""
    model = tiny.llava(num_hidden_layers=2)
    made = tiny.with_thresholds(
        tiny.guard(model, [tiny.gate("vlm", 0)], layers=[1], reference="anchor"), [[-1e9]]
    )
    inputs = {"input_ids": torch.tensor([tiny.words(0, 6)])}
    with torch.no_grad():
        with made.attach(model):
            expected = model(**inputs).logits
        compiled = _compiled(how, model)
        plain = compiled(**inputs).logits
        with made.attach(model) as session:
            torch.testing.assert_close(compiled(**inputs).logits, expected)
            assert [d.fired for d in session.decisions] == [True]
        assert not torch.allclose(plain, expected)
        torch.testing.assert_close(compiled(**inputs).logits, plain)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["its forward", "its class's forward"])
def test_a_compiled_forward_from_before_is_refused(how):
    """It goes round the model's own hooks."""
    model = tiny.llava(num_hidden_layers=2)
    made = tiny.guard(model, [tiny.gate("vlm", 0)], layers=[1], reference="anchor")
    inputs = {"input_ids": torch.tensor([tiny.words(0, 6)])}
    compiled = _compiled(how, model)
    with torch.no_grad():
        compiled(**inputs)
        with made.attach(model), pytest.raises(GuardRuntimeError, match="outside"):
            compiled(**inputs)
    torch._dynamo.reset()


def test_compiled_after_attaching():
    """Twice under guard, with the gate open and shut; free of it afterwards."""
    torch._dynamo.reset()
    model = tiny.llava(num_hidden_layers=2)
    scores = []
    prompts = [tiny.words(0, 6), tiny.words(1, 6)]
    made = tiny.guard(model, [tiny.gate("vlm", 0)], layers=[1], reference="anchor")
    inputs = [{"input_ids": torch.tensor([prompt])} for prompt in prompts]
    with torch.no_grad(), made.attach(model) as session:
        for one in inputs:
            model(**one)
            scores.append(session.decisions[0].scores["vlm.0"][0])
    made = tiny.with_thresholds(made, [[sum(scores) / 2]])
    with torch.no_grad():
        plain = [model(**one).logits for one in inputs]
        with made.attach(model):
            expected = [model(**one).logits for one in inputs]
        with made.attach(model) as session:
            compiled, fired = torch.compile(model, backend="eager"), []
            for one, logits in zip(inputs, expected, strict=True):
                torch.testing.assert_close(compiled(**one).logits, logits)
                fired.append(session.decisions[0].fired)
        assert sorted(fired) == [False, True]
        for one, logits in zip(inputs, plain, strict=True):
            torch.testing.assert_close(compiled(**one).logits, logits)
    torch._dynamo.reset()


@pytest.mark.parametrize("tokens", [2, None])
def test_compiled_after_attaching_and_decoding_step_by_step(tokens):
    """Steps in which the layers steer, and in which they have nothing to do, in turns."""
    model = tiny.llava(num_hidden_layers=2)
    made = tiny.guard(model, [tiny.gate("vlm", 0)], layers=[0, 1], reference="anchor")
    inputs = [{"input_ids": torch.tensor([tiny.words(seed, 6)])} for seed in (0, 1, 2, 0)]

    def decoded(call):
        tables = []
        for one in inputs:
            out = call(**one, past_key_values=DynamicCache())
            for _ in range(4):
                tables.append(out.logits[:, -1])
                token = tables[-1].argmax(-1, keepdim=True)
                out = call(input_ids=token, past_key_values=out.past_key_values)
        return torch.cat(tables)

    scores = []
    with torch.no_grad(), made.attach(model) as session:
        for one in inputs[:3]:
            model(**one)
            scores.append(session.decisions[0].scores["vlm.0"][0])
    middle = sum(sorted(scores)[:2]) / 2  # one of the three stays shut
    made = tiny.guard(
        model,
        [tiny.gate("vlm", 0, threshold=middle)],
        layers=[0, 1],
        reference="anchor",
        tokens=tokens,
    )
    torch._dynamo.reset()
    with torch.no_grad():
        with made.attach(model):
            expected = decoded(model)
        with made.attach(model) as session:
            torch.testing.assert_close(decoded(torch.compile(model, backend="eager")), expected)
            told = session.attestation
    assert told.calls.made == told.calls.expected == 2 * 5
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(mixed, reentrant):
    model = tiny.llava()
    made, references = calibrated(model, tiny.PROMPTS)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    inputs = tiny.batch(tiny.PROMPTS)
    with made.attach(model):
        logits = model(**inputs).logits
        for row, reference in enumerate(references):
            kept = inputs["attention_mask"][row].bool()
            expected = reference.logits([])
            torch.testing.assert_close(logits[row, kept].detach(), expected, **CLOSE)
        logits.sum().backward()
    model.eval()
    with made.attach(model):
        holds(references, *generate(model, inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_restores_to_its_own_rounding(dtype):
    """At every changed column the coordinates are (1 + alpha) times the anchors' mean."""
    model = tiny.llava().to(dtype)
    made = always(model, reference="anchor", alpha=0.5, tokens=2)
    states = {}
    inputs = tiny.batch(tiny.PROMPTS)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with made.attach(model) as session:
        hooks = [
            find_decoder(model)
            .layers[layer]
            .register_forward_hook(
                lambda _, __, out, n=layer: states.setdefault(n, []).append(out.double())
            )
            for layer in made.config.steering.layers
        ]
        generate(model, inputs)
        for hook in hooks:
            hook.remove()
        assert all(d.fired for d in session.decisions)
    for layer in made.config.steering.layers:
        rows = made.tensors[f"directions.{layer}"].double()
        target = 1.5 * made.tensors[f"anchor.{layer}"].double()
        prompt, second, third, _ = states[layer][-NEW:]  # after the text-only pass
        for state in (prompt[:, -1], second[:, 0]):
            slack = torch.finfo(dtype).eps * state.norm(dim=1).max()
            assert ((state @ rows.T - target).abs() < slack).all()
        assert ((third[:, 0] @ rows.T - target).abs().amax(1) > 0.1).all()


def test_layers_whose_weights_are_elsewhere_between_calls():
    """As accelerate leaves them for a model larger than its device: on `meta` until needed."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny.llava()
    made, references = calibrated(model, tiny.PROMPTS)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=False)
    assert next(find_decoder(model).layers[2].parameters()).device.type == "meta"
    session = Session(made.config, made.tensors, made.image_markup, model)
    try:
        tokens, logits = generate(model, tiny.batch(tiny.PROMPTS))
    finally:
        session.detach()
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    holds(references, tokens, logits)


def test_directions_follow_the_states_to_their_device(model):
    """The plan of a dose is made where the layer's states are, not where a parameter lies."""
    made = always(model)
    layer = made.config.steering.layers[0]
    steerer = Steerer(made.config.steering, made.tensors, text_gates=True)
    elsewhere = steerer.directions(layer, torch.device("meta"))
    assert elsewhere.device.type == "meta"


# -- adapters ----------------------------------------------------------------------------------


def _lora():
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    return peft, settings


def test_an_adapter_on_the_model_needs_a_guard_of_its_own():
    _, settings = _lora()
    model = tiny.llava()
    without = always(model)
    model.add_adapter(settings)
    with pytest.raises(GuardError, match="weights differ"), without.attach(model):
        pass
    made, references = calibrated(model, tiny.PROMPTS)  # of the model with its adapter
    with made.attach(model):
        holds(references, *generate(model, tiny.batch(tiny.PROMPTS)))


def test_an_adapter_that_comes_under_guard_is_noticed():
    _, settings = _lora()
    model = tiny.llava()
    with always(model).attach(model):
        generate(model, tiny.batch(tiny.PROMPTS))
        model.add_adapter(settings)
        with pytest.raises(GuardRuntimeError, match="adapter"):
            generate(model, tiny.batch(tiny.PROMPTS))


@pytest.mark.parametrize("place", ["model", "decoder", "a module of its own"])
def test_an_adapter_that_comes_around_a_part_is_noticed(place):
    peft, settings = _lora()
    model = tiny.llava()
    with always(model).attach(model):
        generate(model, tiny.batch(tiny.PROMPTS))
        if place == "model":
            peft.get_peft_model(model, settings)
        elif place == "decoder":
            inner = model.model.language_model
            model.model.language_model = peft.get_peft_model(inner, settings)
        else:  # as one that was loaded with its adapter already
            projector = torch.nn.Sequential(model.model.multi_modal_projector)
            projector.peft_config = {"default": settings}
            model.model.multi_modal_projector = projector
        with pytest.raises(GuardRuntimeError, match="adapter"):
            generate(model, tiny.batch(tiny.PROMPTS))


def _two_adapters():
    """A model with two adapters at work, and what brings it into another state."""
    _, settings = _lora()
    model = tiny.llava()
    names = ["first", "second"]
    for name in names:
        model.add_adapter(settings, name)

    def switch(how):
        model.set_adapter([how] if how in names else names)
        model.enable_adapters()
        if how == "none":
            model.disable_adapters()

    switch("both")
    return model, switch


@pytest.mark.parametrize("known", ["both", "first", "none"])
def test_a_guard_belongs_to_the_adapters_at_work(known):
    model, switch = _two_adapters()
    switch(known)
    made = always(model)
    for how in ("first", "none", "second", "both"):
        switch(how)
        if how == known:
            with made.attach(model):
                generate(model, tiny.batch(tiny.PROMPTS))
        else:
            with pytest.raises(GuardError, match="weights differ"), made.attach(model):
                pass


def _scaled(model, scale):
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["first"] = scale


def test_an_adapters_scale_is_a_part_of_the_model():
    model, _ = _two_adapters()
    made = always(model)
    inputs = tiny.batch(tiny.PROMPTS)
    with made.attach(model):
        generate(model, inputs)
        _scaled(model, 0.5)
        with pytest.raises(GuardRuntimeError, match="switched"):
            generate(model, inputs)
    with pytest.raises(GuardError, match="weights differ"), made.attach(model):
        pass


def test_an_adapter_on_the_language_model_alone_counts():
    _, settings = _lora()
    model = tiny.llava()
    model.model.language_model.add_adapter(settings, "first")
    made = always(model)
    _scaled(model, 0.5)
    with pytest.raises(GuardError, match="weights differ"), made.attach(model):
        pass


def test_a_module_trained_whole_may_have_a_scale_of_its_own():
    """PEFT's wrapper lends the attributes of what it wraps: attention calls its factor a scale."""
    peft, _ = _lora()
    model = tiny.llava()
    both = peft.LoraConfig(target_modules=["gate_proj"], modules_to_save=["self_attn"], r=2)
    wrapped = peft.get_peft_model(model, both).eval()
    with always(model).attach(model):
        generate(wrapped, tiny.batch(tiny.PROMPTS))


@pytest.mark.parametrize("how", ["first", "none"])
def test_an_adapter_that_is_switched_under_guard_is_noticed(how):
    model, switch = _two_adapters()
    inputs = tiny.batch(tiny.PROMPTS)
    with always(model).attach(model):
        generate(model, inputs)
        switch(how)
        for call in (lambda: generate(model, inputs), lambda: model(**inputs)):
            with pytest.raises(GuardRuntimeError, match="switched"):
                call()
        switch("both")
        generate(model, inputs)


def test_an_adapter_for_each_row_is_noticed():
    peft, settings = _lora()
    model = tiny.llava()
    wrapped = peft.get_peft_model(model, settings).eval()
    inputs = tiny.batch(tiny.PROMPTS)
    rows = ["default", "__base__"] * (len(tiny.PROMPTS) // 2)
    with always(model).attach(model), pytest.raises(GuardRuntimeError, match="switched"):
        wrapped.generate(**inputs, adapter_names=rows, max_new_tokens=2)


def test_a_model_inside_a_peft_model():
    peft, settings = _lora()
    model = tiny.llava()
    without = always(model)
    wrapped = peft.get_peft_model(model, settings).eval()
    with pytest.raises(ModelError, match="attach the guard to the inner model"):
        without.attach(wrapped).__enter__()
    with pytest.raises(GuardError), without.attach(model):  # made without the adapter
        pass
    made, references = calibrated(model, tiny.PROMPTS)
    with made.attach(model):  # the guard on the VLM, the call through its wrapper
        holds(references, *generate(wrapped, tiny.batch(tiny.PROMPTS)))
    assert "generate" not in model.__dict__


# -- threads -----------------------------------------------------------------------------------


class _Stops:
    """A streamer that waits in the middle of a generation."""

    def __init__(self, then=None):
        self.there, self.go, self.then, self.calls = threading.Event(), threading.Event(), then, 0

    def put(self, _):
        self.calls += 1
        if self.calls == 3:
            self.there.set()
            if self.then:
                self.then()
            else:
                self.go.wait(10)

    def end(self):
        pass


def _in_thread(function, *args, **kwargs):
    """Start a call; returns its thread and where its result or exception will be."""
    box = []

    def run():
        try:
            box.append(function(*args, **kwargs))
        except Exception as error:
            box.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, box


def test_attached_in_one_thread_used_in_another(model, mixed):
    made, references = mixed
    with made.attach(model):
        thread, box = _in_thread(generate, model, tiny.batch(tiny.PROMPTS))
        thread.join()
        holds(references, *box[0])
        holds(references, *generate(model, tiny.batch(tiny.PROMPTS)))


@pytest.mark.parametrize("call", ["generate", "forward", "decoding"])
def test_a_call_beside_a_generation_is_refused_and_leaves_it_alone(model, mixed, call):
    made, references = mixed
    inputs = tiny.batch(tiny.PROMPTS[:1])
    streamer = _Stops()
    with made.attach(model):
        cache = DynamicCache()
        model(**inputs, past_key_values=cache)
        thread, box = _in_thread(generate, model, inputs, streamer=streamer)
        assert streamer.there.wait(10)
        with pytest.raises(GuardRuntimeError, match="already"):
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
            thread, got = _in_thread(called, input_ids=ids)
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
        thread, box = _in_thread(generate, model, inputs)
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
    assert all("already" in str(error) for error in refused)


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
        thread, _ = _in_thread(dies)
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
        thread, _ = _in_thread(lives_on)
        assert done.wait(30)
        model(input_ids=ids)  # and the turn was given back
    resting.set()
    thread.join()
    model(input_ids=ids)
    assert "forward" not in vars(model)


def test_a_generate_kept_from_before_the_end_is_refused(model):
    with always(model).attach(model):
        kept = model.generate
    with pytest.raises(GuardRuntimeError, match="detached"):
        kept(**tiny.batch(tiny.PROMPTS))
    generate(model, tiny.batch(tiny.PROMPTS))


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


def test_a_picture_that_nobody_read_is_refused_where_the_guard_counts_on_its_words(model):
    made = always(model)
    reads = tiny.changed(made, reads_pictures=True)
    pictured, plain = tiny.batch(tiny.PROMPTS[:1]), tiny.batch(TEXTS[:1])
    with reads.attach(model):
        with pytest.raises(GuardRuntimeError, match="were not read"):
            model.generate(**pictured, max_new_tokens=2)
        words = {"text_input_ids": torch.tensor([tiny.words(1, 5)])}
        model.generate(**pictured, **words, max_new_tokens=2)
        model.generate(**plain, max_new_tokens=2)


def test_a_guard_that_pads_with_no_token_of_the_model_is_refused(model):
    made = always(model)
    markup = made.config.markup.model_copy(update={"pad_id": 2**31 - 1})
    changed = tiny.changed(made, markup=markup)
    with pytest.raises(GuardError, match="pads with token"), changed.attach(model):
        pass


def test_leaving_inside_a_generation_is_refused(model, mixed):
    made, references = mixed
    inputs = tiny.batch(tiny.PROMPTS[:1])
    with made.attach(model) as session:

        def leave():
            with pytest.raises(GuardRuntimeError, match="inside"):
                session.detach()

        holds(references[:1], *generate(model, inputs, streamer=_Stops(leave)))


# -- hooks that go or do not come --------------------------------------------------------------


def _hooks(model):
    return [
        (name, dict(module._forward_hooks), dict(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("place", ["model", "layer", "everything"])
def test_hooks_that_are_removed_in_the_middle(place):
    model = tiny.llava()

    def remove():
        if place == "model":
            del model.forward  # the one that a guard puts in place of the class's
        elif place == "layer":
            find_decoder(model).layers[4]._forward_hooks.clear()
        else:
            for module in model.modules():
                module._forward_hooks.clear()
                module._forward_pre_hooks.clear()

    inputs, streamer = tiny.batch(tiny.PROMPTS[:1]), _Stops(remove)
    with always(model).attach(model) as session:
        with pytest.raises(GuardRuntimeError):
            generate(model, inputs, streamer=streamer)
        assert session._request is None
    assert streamer.calls == 3  # nobody gets a token from behind that place
    assert "generate" not in model.__dict__


def test_a_forward_call_without_any_hooks_is_refused():
    """Without hooks torch calls ``forward`` right away."""
    model = tiny.llava()
    inputs = tiny.batch(tiny.PROMPTS[:1])
    with always(model).attach(model) as session:
        model(**inputs)
        for module in model.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        with pytest.raises(GuardRuntimeError, match="hooks"):
            model(**inputs)
        assert session.attestation is None


def test_a_layer_left_out_for_another_run_twice():
    """The number of calls alone would look right."""
    model = tiny.llava()
    decoder = find_decoder(model)
    made = always(model, reference="anchor", layers=[2, 3])
    with made.attach(model):
        model(**tiny.batch(tiny.PROMPTS), use_cache=False)
        layers = list(decoder.layers)
        decoder.module.layers = nn.ModuleList([*layers[:3], layers[2], *layers[4:]])
        with pytest.raises(GuardRuntimeError, match="withheld"):
            model(**tiny.batch(tiny.PROMPTS), use_cache=False)


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_a_half_attached_guard_is_taken_out_again(model, monkeypatch, fails):
    made = always(model, layers=[1, 2, 4])
    before, calls = _hooks(model), []
    register = nn.Module.register_forward_hook

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == fails:
            raise MemoryError("on purpose")
        return register(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "register_forward_hook", failing)
    with pytest.raises(MemoryError), made.attach(model):
        pass
    monkeypatch.undo()
    assert _hooks(model) == before
    assert not {"generate", "prepare_inputs_for_generation"} & set(model.__dict__)
    with made.attach(model) as session:
        generate(model, tiny.batch(tiny.PROMPTS))
        assert all(d.fired for d in session.decisions)


def test_attached_again_and_again(model, mixed):
    made, references = mixed
    before = _hooks(model)
    for _ in range(3):
        with made.attach(model):
            holds(references, *generate(model, tiny.batch(tiny.PROMPTS)))
            with pytest.raises(GuardError, match="already"), made.attach(model):
                pass
            with pytest.raises(GuardError, match="already"), always(model).attach(model):
                pass
        assert _hooks(model) == before


# -- what the session attests ------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("tokens", [1, 3, None])
def test_the_attestation_of_a_generation(model, tokens, use_cache):
    made, references = calibrated(model, tiny.PROMPTS, tokens=tokens)
    with made.attach(model) as session:
        assert session.attestation is None
        generate(model, tiny.batch(tiny.PROMPTS), use_cache=use_cache)
        told = session.attestation
        assert [row.decision for row in told.rows] == session.decisions
    assert told.layers == (2, 4, 5)  # steered 2 and 4, gates at 5 and 2
    assert (told.calls.passes, told.calls.made, told.calls.expected) == (NEW, 3 * NEW, 3 * NEW)
    by_text = any(r.is_open(0, "text") for r in references)
    assert by_text
    assert (told.text_pass.passes, told.text_pass.made, told.text_pass.expected) == (1, 3, 3)
    dose = min(tokens or NEW, NEW)
    for row, reference in zip(told.rows, references, strict=True):
        assert row.changed == ({2: dose, 4: dose} if reference.fired else {})
        for index, gate in enumerate(made.config.gates):
            score = row.decision.scores[f"{gate.source}.{index}"]
            known = reference.known.scores[index]
            expected = [known[layer] for layer in gate.layers]
            torch.testing.assert_close(torch.tensor(score), torch.tensor(expected), **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_attestation_counts_no_padding(model, side):
    made = always(model, positions="all", tokens=2)
    with made.attach(model) as session:
        model(**tiny.batch(tiny.PROMPTS, side))
        told = session.attestation
    for row, prompt in zip(told.rows, tiny.PROMPTS, strict=True):
        assert row.changed == {2: len(prompt), 4: len(prompt)}


def test_a_gate_inside_the_vlm_steers_the_layers_below_it_one_step_later(model):
    made = tiny.guard(model, [tiny.gate("vlm", 3, threshold=-1e9)], tokens=3, reference="anchor")
    with made.attach(model) as session:
        generate(model, tiny.batch(tiny.PROMPTS))
        rows = session.attestation.rows
    assert all(row.changed == {2: 2, 4: 3} for row in rows)


def test_nothing_is_attested_of_a_request_that_was_refused(model):
    prompt = torch.tensor([tiny.words(1, 5)])
    with always(model).attach(model) as session, torch.no_grad():
        for bad in ({"penalty_alpha": 0.6}, {"text_attention_mask": prompt}):
            generate(model, tiny.batch(tiny.PROMPTS))
            assert session.decisions
            with pytest.raises(GuardRuntimeError):
                model.generate(prompt, max_new_tokens=2, **bad)
            assert session.attestation is None and session.decisions == []
        model(**tiny.batch(tiny.PROMPTS))
        with pytest.raises(GuardRuntimeError):
            model(prompt, text_attention_mask=prompt)
        assert session.attestation is None


def test_a_step_that_fails_is_not_attested(model):
    made = always(model, tokens=None)
    steps = iter([None, None, RuntimeError("out of memory")])

    def fails(*_):
        if error := next(steps):
            raise error

    handle = find_decoder(model).layers[5].mlp.register_forward_hook(fails)
    with made.attach(model) as session:
        with pytest.raises(RuntimeError, match="out of memory"):
            generate(model, tiny.batch(tiny.PROMPTS))
        told = session.attestation
    handle.remove()
    assert told.calls.passes == 2
    assert all(row.changed == {2: 2, 4: 2} for row in told.rows)


def test_nothing_is_attested_of_a_request_that_was_withheld(model):
    with always(model).attach(model) as session:
        generate(model, tiny.batch(tiny.PROMPTS))
        find_decoder(model).layers[4]._forward_hooks.clear()
        with pytest.raises(GuardRuntimeError):
            generate(model, tiny.batch(tiny.PROMPTS))
        assert session.attestation is None
        assert session.decisions == []


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
