"""Guards on models whose weights are quantised, offloaded or dispatched; the digest of weights."""

import copy

import pytest
import torch
from torch import nn

from tests import checkpoint, tiny
from tests.reference import Reference, calibrated, holds
from tests.tiny import generate
from vlm_safeguard.calibration import doctor
from vlm_safeguard.errors import GuardError, ModelError
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.loading import load
from vlm_safeguard.model.residual_stream import find_decoder, verify_residual_stream
from vlm_safeguard.model.weights import input_device, stored, weights_digest

accelerate = pytest.importorskip("accelerate")
CPU = torch.device("cpu")


def tied():
    """Its embedding is its head: one parameter in two places."""
    return tiny.llava(tie_word_embeddings=True)


# -- offloaded and dispatched ------------------------------------------------------------------

PLACES = ["model.vision_tower", "model.multi_modal_projector", "model.language_model.embed_tokens"]
PLACES += [f"model.language_model.layers.{n}" for n in range(tiny.LAYERS)]
PLACES += ["model.language_model.norm", "model.language_model.rotary_emb", "lm_head"]


def to_cpu(model, _):
    accelerate.cpu_offload(model, execution_device=CPU)


def to_cpu_with_buffers(model, _):
    accelerate.cpu_offload(model, execution_device=CPU, offload_buffers=True)


def whole_layers(model, _):
    """One hook for a layer and all that is in it."""
    layer = [type(find_decoder(model).layers[0]).__name__]
    accelerate.cpu_offload(model, execution_device=CPU, preload_module_classes=layer)


def to_disk(model, folder):
    accelerate.disk_offload(model, folder, execution_device=CPU)


def over_places(model, folder):
    """Some modules stay on the device, some are brought in from the disk, turn by turn."""
    places = {name: "disk" if n % 2 else "cpu" for n, name in enumerate(PLACES)}
    places["model.language_model.embed_tokens"] = places["lm_head"] = "cpu"
    accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=folder, force_hooks=True
    )


OFFLOADS = [to_cpu, to_cpu_with_buffers, whole_layers, to_disk, over_places]


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("build", [tiny.llava, tied])
def test_guarded_where_weights_are_elsewhere_between_calls(tmp_path, build, offload):
    model = build()
    made, references = calibrated(model, tiny.PROMPTS)
    offload(model, tmp_path)
    assert any(weight.is_meta for weight in model.parameters())
    assert input_device(model) == CPU
    verify_residual_stream(model)
    with made.attach(model) as session:
        tokens, logits = generate(model, tiny.batch(tiny.PROMPTS))
        assert [d.fired for d in session.decisions] == [r.fired for r in references]
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    holds(references, tokens, logits)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_other_weights_are_noticed_where_they_are_offloaded(tmp_path, offload):
    model = tiny.llava()
    made = tiny.guard(model, [tiny.gate("text", 2)])
    with torch.no_grad():
        find_decoder(model).layers[3].mlp.up_proj.weight[0, 0] += 1
    offload(model, tmp_path)
    with pytest.raises(GuardError, match="weights differ"), made.attach(model):
        pass


def test_offloaded_under_guard():
    """accelerate's hooks go under the guard's, whenever they come and go."""
    model = tiny.llava()
    made, references = calibrated(model, tiny.PROMPTS)
    plain = model(**tiny.batch(tiny.PROMPTS[:1])).logits
    with made.attach(model):
        accelerate.cpu_offload(model, execution_device=CPU)
        tokens, logits = generate(model, tiny.batch(tiny.PROMPTS))
    assert torch.equal(model(**tiny.batch(tiny.PROMPTS[:1])).logits, plain)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    holds(references, tokens, logits)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_checkpoint_loaded_over_several_places(tmp_path, place):
    from transformers import AutoModelForImageTextToText

    loaded = load(checkpoint.save(tmp_path / "model"))
    made = tiny.always(loaded.model)
    places = dict.fromkeys(PLACES, "cpu") | {PLACES[4]: "disk", PLACES[-1]: place}
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "off", dtype=torch.float32
    )
    inputs = encode(loaded, ["What is it?"], [None])
    with made.attach(loaded.model):
        expected = generate(loaded.model, inputs)[1]
    loaded.model = model
    with made.attach(model):
        logits = generate(model, encode(loaded, ["What is it?"], [None]))[1]
    torch.testing.assert_close(logits, expected)
    assert doctor.describe(loaded).devices == ("cpu", "offloaded")


def test_weights_that_are_nowhere_are_refused():
    model = tiny.llava()
    made = tiny.guard(model, [tiny.gate("text", 2)])
    with pytest.raises(ModelError, match=r"no weights at lm_head\.weight"):
        made.check_model(copy.deepcopy(model).to("meta"))
    find_decoder(model).layers[1].mlp.to("meta")
    with pytest.raises(ModelError, match=r"no weights at .*layers\.1\.mlp"):
        made.check_model(model)


# -- quantised ---------------------------------------------------------------------------------


def to_int8(model, activations=False, only=None):
    """int8 weights by torchao; with ``activations`` these too, from call to call."""
    torchao = pytest.importorskip("torchao.quantization")
    how = torchao.Int8DynamicActivationInt8WeightConfig if activations else None
    torchao.quantize_(model, (how or torchao.Int8WeightOnlyConfig)(), filter_fn=only)
    return model


def test_a_model_quantised_to_int8_has_a_guard_of_its_own():
    model = to_int8(tiny.llava())
    made, references = calibrated(model, tiny.PROMPTS)
    with made.attach(model) as session:
        holds(references, *generate(model, tiny.batch(tiny.PROMPTS)))
        assert [d.fired for d in session.decisions] == [r.fired for r in references]
        out = generate(model, tiny.batch(tiny.PROMPTS), do_sample=True, num_return_sequences=2)
        holds(references, *out, 2)
        holds(references[:1], *generate(model, tiny.batch(tiny.PROMPTS[:1]), use_cache=False))


@pytest.mark.parametrize("mode", ["add", "restore"])
def test_int8_activations_are_steered_to_the_target(mode):
    """Such a model rounds a row otherwise from batch to batch, so it is held to the formula."""
    model = to_int8(tiny.llava(), activations=True)
    made = tiny.guard(
        model,
        [tiny.gate("text", 2, threshold=-1e9)],
        mode=mode,
        reference="anchor",
        layers=[2],
        tokens=1,
    )
    module, inputs, states = find_decoder(model).layers[2], tiny.batch(tiny.PROMPTS), []

    def keep(_, __, out):
        states.append(out[:, -1].double())

    module.register_forward_hook(keep)
    with made.attach(model):
        module.register_forward_hook(keep)
        with torch.no_grad():
            model(**inputs)
    text_only, plain, steered = states[0], *states[-2:]  # before and after the guard's own hook
    rows = made.tensors["directions.2"].double()
    if mode == "add":
        expected = plain @ rows.T + 0.5 * text_only @ rows.T
    else:
        expected = (1.5 * made.tensors["anchor.2"].double()).expand(len(plain), -1)
    torch.testing.assert_close(steered @ rows.T, expected, atol=1e-4, rtol=1e-4)


def test_the_digest_of_quantised_weights():
    """Each weight and each way of quantising it has its own; one of one model and way."""
    first = weights_digest(to_int8(tiny.llava()))
    assert first == weights_digest(to_int8(tiny.llava()))
    one_layer = to_int8(tiny.llava(), only=lambda _, name: name.endswith("layers.3.mlp.up_proj"))
    other = to_int8(tiny.llava())
    with torch.no_grad():
        find_decoder(other).layers[3].mlp.up_proj.weight.scale[0] *= 2
    others = [tiny.llava(), one_layer, to_int8(tiny.llava(), activations=True), other]
    digests = {first, *map(weights_digest, others)}
    assert len(digests) == 5


def test_a_guard_of_the_unquantised_model_is_refused_with_a_way_out():
    made = tiny.guard(tiny.llava(), [tiny.gate("text", 2)])
    model = to_int8(tiny.llava())
    with (
        pytest.raises(GuardError, match="quantised: calibrate on the quantised model itself"),
        made.attach(model),
    ):
        pass


def test_a_quantised_checkpoint(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import AutoModelForImageTextToText, TorchAoConfig

    folder = checkpoint.save(tmp_path)
    how = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    model = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=how)
    made = tiny.always(model, tokens=None)
    model.save_pretrained(folder)
    loaded = load(folder)
    ids = torch.tensor([tiny.words(0, 6)])
    reference = Reference(loaded.model, made, ids[0].tolist())
    with made.attach(loaded.model, loaded.processor):
        holds([reference], *generate(loaded.model, {"input_ids": ids}, eos_token_id=-1))


def test_int8_by_its_name(tmp_path):
    pytest.importorskip("torchao")
    folder = checkpoint.save(tmp_path)
    loaded = load(folder, quantization="int8")
    labels = [label for label, _ in stored(loaded.model)]
    assert any("layers.0.mlp.up_proj" in label and "qdata" in label for label in labels)
    made = tiny.always(loaded.model, tokens=None)
    ids = torch.tensor([tiny.words(0, 6)])
    with made.attach(loaded.model, loaded.processor):
        tokens, _ = generate(loaded.model, {"input_ids": ids}, eos_token_id=-1)
    assert tokens.shape == (1, tiny.NEW)


def test_packed_weights_are_refused():
    """They are in no tensor that could be told from another model's."""
    model = tiny.llava()

    class Packed(nn.Linear):
        def get_extra_state(self):
            return (1, 2)

    model.lm_head = Packed(tiny.WIDTH, tiny.VOCAB, bias=False)
    with pytest.raises(ModelError, match=r"packed weights \(lm_head"):
        weights_digest(model)


def test_buffers_of_a_checkpoint_count():
    """Some kinds of quantisation keep their weights there."""
    model = tiny.llava()
    plain = weights_digest(model)
    layer = find_decoder(model).layers[0]
    layer.register_buffer("passing", torch.ones(3), persistent=False)
    assert weights_digest(model) == plain
    layer.register_buffer("qweight", torch.ones(3, dtype=torch.int32))
    first = weights_digest(model)
    layer.qweight[1] = 2
    assert len({plain, first, weights_digest(model)}) == 3
    assert len(dict(stored(model))) == len(list(model.parameters())) + 1
