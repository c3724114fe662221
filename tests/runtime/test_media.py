"""Requests with pictures need every input that the processor makes for them."""

import pytest
import torch

from tests import families, tiny
from vlm_safeguard.errors import GuardRuntimeError
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.picture_inputs import PictureInputs, picture_inputs, usual_inputs
from vlm_safeguard.runtime import media

# What each processor makes beside ids and mask, and the forward takes: of tokens, of pictures.
NEEDED = {
    families.llava: ((), ("pixel_values",)),
    families.gemma3: (("token_type_ids",), ("pixel_values",)),
    families.qwen2_vl: (("mm_token_type_ids",), ("pixel_values", "image_grid_thw")),
    families.idefics3: ((), ("pixel_values", "pixel_attention_mask")),
}
WITH_TYPES = [build for build, (of_tokens, _) in NEEDED.items() if of_tokens]


def guard_of(loaded):
    """A guard that reads the request's own pass alone."""
    return tiny.guard(loaded.model, [tiny.gate("vlm", 2)], layers=[2], reference="anchor")


def scores(loaded, guard, inputs):
    with guard.attach(loaded.model) as session:
        loaded.model.generate(**inputs, max_new_tokens=1)
        return session.decisions[0].scores["vlm.0"]


@pytest.mark.parametrize("build", NEEDED)
def test_what_a_picture_needs(build):
    loaded = build()
    of_tokens, of_pictures = map(frozenset, NEEDED[build])
    assert picture_inputs(loaded.model, loaded.processor) == PictureInputs(of_tokens, of_pictures)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_without_a_processor_no_input_is_asked_for_that_it_would_not_make(name):
    loaded = families.FAMILIES[name].build()
    told = picture_inputs(loaded.model, loaded.processor)
    usual = usual_inputs(loaded.model)
    assert usual.of_tokens == told.of_tokens
    assert usual.of_pictures <= told.of_pictures
    masks = {one for one in told.of_pictures if "mask" in one}
    assert masks - usual.of_pictures <= {"aspect_ratio_mask"}  # without which Mllama fails


@pytest.mark.parametrize("build", WITH_TYPES)
@pytest.mark.parametrize("known", [True, False], ids=["processor", "no processor"])
def test_a_missing_input_moves_the_scores_and_is_refused(build, known, monkeypatch):
    loaded = build()
    model, guard, [[name], _] = loaded.model, guard_of(loaded), NEEDED[build]
    whole = encode(loaded, ["What is this?"], [families.photo(1)])
    part = {key: value for key, value in whole.items() if key != name}
    with monkeypatch.context() as unchecked:
        unchecked.setattr(media, "check_picture_inputs", lambda *_: None)
        moved = scores(loaded, guard, part)
    assert moved != pytest.approx(scores(loaded, guard, whole), rel=0, abs=1e-4)
    plain = encode(loaded, ["What is this?"], [None])
    plain.pop(name, None)
    processor = loaded.processor if known else None
    with guard.attach(model, processor) as session, torch.no_grad():
        for call in (model, model.generate):
            with pytest.raises(GuardRuntimeError, match=f"with pictures comes without {name}"):
                call(**part)
            with pytest.raises(GuardRuntimeError, match=f"with pictures comes without {name}"):
                call(**part, **{name: None})
            assert session.decisions == []
        model.generate(**whole, max_new_tokens=2)
        model.generate(**plain, max_new_tokens=2)


def test_image_tokens_without_the_picture_are_refused(model, loaded):
    guard = tiny.always(model)
    ids = tiny.batch(tiny.PROMPTS[:1])["input_ids"]
    with guard.attach(model, loaded.processor):
        with pytest.raises(GuardRuntimeError, match="comes without pixel_values"):
            model.generate(ids, max_new_tokens=2)
        model.generate(ids[:, tiny.PATCHES + 1 :], max_new_tokens=2)


def test_embeddings_hold_the_pictures_already(model, loaded):
    guard = tiny.always(model)
    inputs = tiny.batch(tiny.PROMPTS[:1])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with guard.attach(model, loaded.processor) as session:
        model.generate(inputs["input_ids"], inputs_embeds=embeds, max_new_tokens=2)
        assert [one.fired for one in session.decisions] == [True]
