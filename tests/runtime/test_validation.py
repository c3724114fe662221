"""Refuses any call that could make a row's result depend on the rest of its batch."""

from functools import partial

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
)

from tests import families, tiny
from tests.tiny import TEXTS, always
from vlm_safeguard.errors import GuardError, GuardRuntimeError
from vlm_safeguard.model.kv_cache import NAME

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


def test_caches_of_other_kinds_or_under_two_names_are_refused(model):
    ids = torch.tensor([tiny.words(0, 10)])
    filled = DynamicCache()
    model(input_ids=ids, past_key_values=filled)
    # A cache under the name of another version than the one that runs is a packed call's.
    foreign = "packed" if NAME != "cache" else "two names"
    with always(model).attach(model):
        for cache in (None, DynamicCache()):
            for other in (None, filled):
                named = {"cache": other, "past_key_values": cache}
                if NAME == "cache" or other is not None:
                    with pytest.raises(GuardRuntimeError, match=foreign):
                        model(input_ids=ids, **named)
        for name in ("cache", "past_key_values"):
            with pytest.raises(GuardRuntimeError, match=r"packed|kind object"):
                model(input_ids=ids, **{name: object()})


@pytest.mark.parametrize("generating", [False, True])
def test_pictures_that_come_encoded_are_refused(model, generating):
    inputs = tiny.batch(tiny.PROMPTS)
    pixels = inputs.pop("pixel_values")
    encoded = model.model.get_image_features(pixel_values=pixels, return_dict=True)
    with always(model).attach(model):
        call = partial(model.generate, max_new_tokens=2) if generating else model
        for given in ({}, {"image": encoded}, {"video": encoded}):
            with pytest.raises(GuardRuntimeError, match="mm_encoder_outputs"):
                call(**inputs, mm_encoder_outputs=given)
            with pytest.raises(GuardRuntimeError, match="mm_encoder_outputs"):
                call(**inputs, pixel_values=pixels, mm_encoder_outputs=given)


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


# -- threads -----------------------------------------------------------------------------------


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
