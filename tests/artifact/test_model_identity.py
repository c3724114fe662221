"""A guard is refused for another model, type, template or processor."""

from types import SimpleNamespace

import pytest
import torch

from tests import families, tiny
from tests.artifact.files import GATES
from vlm_safeguard.errors import GuardError
from vlm_safeguard.model.fingerprint import template_digest
from vlm_safeguard.model.text_only import find_markup


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seed": 1}, "weights"),
        ({"num_hidden_layers": 7}, "layers of"),
        ({"hidden_size": 64}, "layers of"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "configuration"),
    ],
    ids=["weights", "depth", "width", "configuration"],
)
def test_another_model_is_refused(made, options, said):
    with pytest.raises(GuardError, match=said), made.attach(tiny.llava(**options)):
        pass


def test_a_guard_for_another_type_is_refused(made):
    """Thresholds hold for states of the type that they were set on."""
    identity = made.config.model.model_copy(update={"dtype": "float32"})
    guard = tiny.changed(made, model=identity)
    guard.check_model(tiny.llava())
    with pytest.raises(GuardError, match=r"in float32, and the model is in torch\.bfloat16"):
        guard.check_model(tiny.llava().to(torch.bfloat16))


def test_bfloat16_is_accepted_where_no_type_was_recorded(made):
    model = tiny.llava().to(torch.bfloat16)
    inputs = tiny.batch(tiny.PROMPTS)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with made.attach(model) as session, torch.no_grad():
        assert model(**inputs).logits.dtype == torch.bfloat16
        assert len(session.decisions) == len(tiny.PROMPTS)


def test_one_changed_layer_is_noticed(made):
    model = tiny.llava()
    with torch.no_grad():
        model.model.language_model.layers[5].mlp.down_proj.weight += 0.01
    with pytest.raises(GuardError, match="weights"):
        made.check_model(model)


def test_the_revision_is_for_people(made):
    identity = made.config.model.model_copy(update={"revision": "0123abc"})
    guard = tiny.changed(made, model=identity)
    guard.check_model(tiny.llava())  # loaded from nowhere
    with pytest.raises(GuardError, match="for tiny of revision 0123abc: the model's weights"):
        guard.check_model(tiny.llava(seed=1))


def test_weights_of_another_type_are_named(made):
    model = tiny.llava()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e-6)  # float16 rounds these otherwise
    guard = tiny.guard(model, GATES)
    guard.check_model(model.bfloat16())
    with pytest.raises(GuardError, match=r"weights differ \(some are float16"):
        guard.check_model(model.half())


def of(loaded):
    """A guard that belongs to a model and its processor."""
    made, found = tiny.guard(loaded.model, GATES, layers=[2, 3]), find_markup(loaded)
    identity = made.config.model.model_copy(
        update={"template_sha256": template_digest(loaded.processor)}
    )
    markup = found.model_copy(update={"pad_id": made.config.markup.pad_id})
    return tiny.changed(made, model=identity, markup=markup)


def test_another_chat_template_is_refused_where_the_processor_is_given(made):
    loaded = families.llava()
    model, template, guard = loaded.model, loaded.processor.chat_template, of(loaded)
    guard.check_model(model, loaded.processor)
    with pytest.raises(GuardError, match="chat template differs"):
        guard.check_model(model, SimpleNamespace(chat_template=template + " "))
    with pytest.raises(GuardError, match="no chat template"):
        guard.check_model(model, SimpleNamespace(chat_template=None))
    processor = SimpleNamespace(chat_template="other")
    with pytest.raises(GuardError, match="chat template"), guard.attach(model, processor):
        pass
    made.check_model(tiny.llava(), processor)  # none was recorded
    with guard.attach(model):
        pass


def test_a_processor_that_writes_other_tokens_around_a_picture_is_refused():
    """The same model and template, with a picture in one piece or in tiles."""
    whole, tiles = families.idefics3(), families.idefics3_split()
    assert whole.processor.chat_template == tiles.processor.chat_template
    for own, other in ((whole, tiles), (tiles, whole)):
        guard = of(own)
        guard.check_model(own.model, own.processor)
        with pytest.raises(GuardError, match="around a picture"):
            guard.check_model(own.model, other.processor)
