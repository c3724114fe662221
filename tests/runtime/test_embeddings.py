"""Requests that come as embeddings."""

import pytest
import torch

from tests import tiny
from tests.reference import calibrated, holds
from tests.tiny import NEW, generate
from vlm_safeguard.errors import GuardRuntimeError


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
        assert [d.fired for d in session.decisions] == [r.fired for r in references]


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
