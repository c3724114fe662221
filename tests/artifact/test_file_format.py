"""Strict JSON, the limits of docs/guard-format.md, and any guard within them."""

import json
import re

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests import fuzz
from tests.artifact.files import edit, put_tensors, same, whole
from tests.paths import DOCS
from vlm_safeguard.artifact import config as limits
from vlm_safeguard.artifact import serialization
from vlm_safeguard.artifact.config import Gate, Steering
from vlm_safeguard.errors import GuardError
from vlm_safeguard.guard import CONFIG_FILE, TENSOR_FILE, Guard

# -- strict JSON and the limits of docs/guard-format.md ----------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: "\ufeff" + t, "byte order mark"),
        (lambda t: t.encode("utf-16"), "not UTF-8"),
        (lambda t: t.replace("tiny", "t\\u0000"), "control characters"),
        (lambda t: t.replace("tiny", "t\\ud800"), "control characters"),
        (lambda t: t.replace("tiny", "\\u001b[31m"), "control characters"),
        (lambda t: t.replace('"pad_id": 0', '"pad_id": 0, "pad_id": 1'), "'pad_id' twice"),
        (lambda t: t.replace('"pad_id": 0', '"pad_id": NaN'), "NaN"),
        (lambda t: t.replace('"alpha": 0.5', '"alpha": Infinity'), "Infinity"),
        (lambda t: t.replace('"alpha": 0.5', '"alpha": 1e999'), "not finite"),
        (lambda t: t.replace('"pad_id": 0', '"pad_id": ' + "9" * 5000), "the integer 999"),
        (lambda t: t.replace('"pad_id": 0', f'"pad_id": {2**53 + 1}'), "the integer"),
        (lambda t: t.replace('"pad_id": 0', '"pad_id": 0.0'), "valid integer"),
        (lambda t: t.replace('"pad_id": 0', '"pad_id": false'), "valid integer"),
        (lambda t: t.replace('"per_layer": true', '"per_layer": 1'), "valid boolean"),
        (lambda t: t.replace('"schema_version": 2', '"schema_version": true'), "schema True"),
        (lambda t: t.replace('"schema_version": 2', '"schema_version": 2.0'), "schema 2.0"),
        (lambda t: t + "{}", "not valid JSON"),
        (lambda t: t + " " * (1 << 20), "larger"),
    ],
    ids=range(18),
)
def test_json_is_strict(folder, change, said):
    text, blob = whole(folder)
    changed = change(text)
    assert changed != text
    data = changed if isinstance(changed, bytes) else changed.encode()
    with pytest.raises(GuardError, match=said):
        Guard.from_bytes(data, blob)


def _nested(depth):
    value = 0
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("most", "more", "said"),
    [
        # "calibration" lies in the second object.
        ({"x": _nested(14)}, {"x": _nested(15)}, "nested"),
        ({"x": "y" * 4096}, {"x": "y" * 4097}, "text"),
        ({"y" * 4096: 0}, {"y" * 4097: 0}, "text"),
        ({"x": 2**53}, {"x": -(2**53) - 1}, "integer"),
        ({"x": [0] * 99_000}, {"x": [0] * 100_000}, "values"),
        ({"budget": {"kl": 1}}, {"budget": {"kl": "1"}}, "budget"),
        ({"budget": {}}, {"budget": [1]}, "budget"),
    ],
    ids=["depth", "text", "key", "integer", "values", "budget", "list"],
)
def test_a_record_of_any_form_within_the_limits(folder, most, more, said):
    edit(folder, calibration=most)
    assert Guard.from_pretrained(folder).config.calibration == most
    edit(folder, calibration=more)
    with pytest.raises(GuardError, match=said):
        Guard.from_pretrained(folder)


@pytest.mark.parametrize(
    ("part", "field", "most", "more"),
    [
        ("model", "name", "n" * 256, "n" * 257),
        ("model", "template_sha256", "", "0" * 63),
        ("model", "dtype", "float16", "float64"),
        ("model", "revision", "r" * 256, "r" * 257),
        ("model", "weights_sha256", "0" * 64, "A" * 64),
        ("model", "config_sha256", "a" * 64, ""),
        ("model", "layers", 1024, 1025),
        ("markup", "pad_id", 2**31 - 1, 2**31),
        ("markup", "token_ids", [7] * 256, [7] * 257),
        ("markup", "before", [0], [-1]),
        ("steering", "alpha", 10_000, 10_001),
        ("steering", "tokens", 1_000_000, 1_000_001),
    ],
)
def test_the_largest_value_that_is_allowed(folder, part, field, most, more):
    raw = json.loads((folder / CONFIG_FILE).read_text())
    edit(folder, **{part: raw[part] | {field: most}})
    assert getattr(getattr(Guard.from_pretrained(folder).config, part), field) == most
    edit(folder, **{part: raw[part] | {field: more}})
    with pytest.raises(GuardError, match=f"{part}.{field}"):
        Guard.from_pretrained(folder)


def test_too_many_gates_files_and_too_large_thresholds(folder):
    raw = json.loads((folder / CONFIG_FILE).read_text())
    for changes, said in [
        ({"gates": raw["gates"][:1] * 17}, "gates"),
        ({"data_sha256": {str(n): "0" * 64 for n in range(65)}}, "data_sha256"),
        ({"gates": [raw["gates"][0] | {"thresholds": [1.1e20, 0.0]}]}, "thresholds"),
        ({"gates": [raw["gates"][0] | {"openings": list(range(65))}]}, "openings"),
    ]:
        edit(folder, **(raw | changes))
        with pytest.raises(GuardError, match=said):
            Guard.from_pretrained(folder)


def test_settings_cannot_call_for_unbounded_memory(folder):
    raw = json.loads((folder / CONFIG_FILE).read_text())
    model = raw["model"] | {"hidden_size": 65_536, "layers": 1024}
    steering = raw["steering"] | {"rank": 1024, "layers": list(range(1024))}
    edit(folder, model=model, steering=steering)
    with pytest.raises(GuardError, match="bytes of tensors, larger than any guard"):
        Guard.from_pretrained(folder)


def test_the_documented_limits_are_those_of_the_code():
    page = (DOCS / "guard-format.md").read_text()
    rows = re.findall(r"\| (\d+)[^|]*\| `(MAX_\w+)` \|", page)
    stated = {name: int(value) for value, name in rows}
    own = {
        name: value
        for module in (serialization, limits)
        for name, value in vars(module).items()
        if name.startswith("MAX_")
    }
    assert stated == own


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h: h | {"__metadata__": {"format": "pt"}}, "__metadata__"),
        (lambda h: h | {"more": h["anchor.2"]}, "more"),
        (lambda h: h | {"anchor.2": h["anchor.2"] | {"dtype": "I32"}}, "'I32', not float32"),
        (lambda h: h | {"anchor.2": h["anchor.2"] | {"shape": [3, 1]}}, "shape"),
        (lambda h: h | {"anchor.2": h["anchor.2"] | {"shape": [3.0]}}, "shape"),
        (lambda h: h | {"anchor.2": h["anchor.4"]}, "overlap"),
        (lambda h: h | {"anchor.2": h["anchor.2"] | {"x": 1}}, "malformed"),
        (lambda h: list(h), "do not fit"),
    ],
    ids=range(8),
)
def test_headers_that_do_not_fit(folder, change, said):
    blob = (folder / TENSOR_FILE).read_bytes()
    length = int.from_bytes(blob[:8], "little")
    header = change(json.loads(blob[8 : 8 + length]))
    put_tensors(folder, fuzz.framed(json.dumps(header).encode(), blob[8 + length :]))
    with pytest.raises(GuardError, match=said):
        Guard.from_pretrained(folder)


def test_a_header_with_one_tensor_twice(folder):
    blob = (folder / TENSOR_FILE).read_bytes()
    length = int.from_bytes(blob[:8], "little")
    tree = fuzz.Twice(json.loads(blob[8 : 8 + length]))
    put_tensors(folder, fuzz.framed(fuzz.dump(tree).encode(), blob[8 + length :]))
    with pytest.raises(GuardError, match="twice"):
        Guard.from_pretrained(folder)


def test_an_error_never_repeats_a_hostile_text_raw(folder):
    text, blob = whole(folder)
    for key in ("\\u001b[31m" + "k" * 3000, "\\u202e" + "k" * 3000):
        for changed in (text.replace('"mode"', f'"{key}"'), text.replace("restore", key)):
            with pytest.raises(GuardError) as caught:
                Guard.from_bytes(changed.encode(), blob)
            assert len(str(caught.value)) < 400 and str(caught.value).isprintable()


# -- any guard there is comes back -------------------------------------------------------------


@st.composite
def guards(draw):
    depth, width = draw(st.integers(1, 8)), draw(st.integers(1, 12))
    rank = draw(st.integers(1, width))
    some = st.lists(st.integers(0, depth - 1), min_size=1, unique=True)
    mode = draw(st.sampled_from(["add", "restore"]))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    steered = draw(some)
    tokens = draw(st.none() | st.integers(1, 64) | st.integers(1, 10**6))
    gates, tensors = [], {}
    for index in range(draw(st.integers(1, 4))):
        layers = draw(some)
        cuts = draw(st.lists(st.floats(-1e20, 1e20), min_size=len(layers), max_size=len(layers)))
        source = draw(st.sampled_from(["text", "vlm"]))
        alone = draw(st.booleans())
        if alone:
            assume(set(layers) & set(steered))
        elif source == "vlm" and tokens == 1:
            assume(max(layers) <= max(steered))
        intent = {}
        if source == "text" and not alone and draw(st.booleans()):
            openings = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, unique=True))
            weight, verdict = draw(st.floats(0, 1e20)), draw(st.floats(0, 1e20))
            assume(weight or verdict)
            intent = {"kind": "intent", "openings": openings[:64], "intent_weight": weight}
            intent |= {"verdict_weight": verdict}
        mean = source == "text" and not alone and draw(st.booleans())
        probe = mean and draw(st.booleans())
        gate = Gate(
            source=source,
            layers=layers,
            thresholds=cuts,
            per_layer=alone,
            reads_mean=mean,
            reads_probe=probe,
            **intent,
        )
        gates.append(gate)
        wide = (1 + mean + probe) * width
        tensors[f"gate.{index}"] = torch.randn(len(layers), wide, generator=generator)
    towards = mode == "restore" and tokens and 2 <= tokens <= 64
    later = draw(st.sampled_from(["same", "refusal"] if towards else ["same"]))
    steering = Steering(
        mode=mode,
        layers=steered,
        rank=rank,
        alpha=draw(st.floats(0, 1e4)),
        tokens=tokens,
        reference=draw(st.sampled_from(["text", "anchor"])),
        query=draw(st.sampled_from(["pass", "text"])),
        positions=draw(st.sampled_from(["generated", "all"])),
        later=later,
    )
    for layer in steering.layers:
        square = torch.randn(width, width, generator=generator, dtype=torch.float64)
        tensors[f"directions.{layer}"] = torch.linalg.qr(square)[0][:rank].float()
        tensors[f"anchor.{layer}"] = torch.randn(rank, generator=generator)
        if later == "refusal":
            tensors[f"refusal.{layer}"] = torch.randn(tokens - 1, rank, generator=generator)
    letters = st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"))
    digest = st.text("0123456789abcdef", min_size=64, max_size=64)
    leaves = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(letters)
    leaves |= st.floats(allow_nan=False, allow_infinity=False)
    inner = st.recursive(
        leaves, lambda s: st.lists(s) | st.dictionaries(st.text(letters), s), max_leaves=8
    )
    pictures = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1))
    said = st.integers(0, 2**31 - 1).filter(lambda token: token not in pictures)
    probed = any(one.reads_probe for one in gates)
    frames = st.builds(
        limits.TextFrame,
        before=st.integers(0, 65536),
        after=st.integers(0, 65536),
        probe=st.lists(said, min_size=probed, max_size=256 * probed),
    )
    record = draw(st.dictionaries(st.text(letters).filter("budget".__ne__), inner, max_size=4))
    config = limits.GuardConfig(
        model=limits.ModelIdentity(
            name=draw(st.text(letters, max_size=256)),
            config_sha256=draw(digest),
            weights_sha256=draw(digest),
            template_sha256=draw(st.just("") | digest),
            dtype=draw(st.sampled_from(["", "float32", "bfloat16", "float16"])),
            revision=draw(st.text(letters, max_size=256)),
            hidden_size=width,
            layers=depth,
        ),
        markup=limits.ImageMarkup(token_ids=pictures),
        frame=draw(frames) if any(one.reads_mean for one in gates) else None,
        gates=gates,
        steering=steering,
        data_sha256=draw(st.dictionaries(st.text(letters, max_size=20), digest, max_size=3)),
        calibration=record,
    )
    return Guard(config, tensors)


@given(guards())
@settings(suppress_health_check=list(HealthCheck))
def test_any_guard_comes_back(tmp_path_factory, guard):
    folder = tmp_path_factory.mktemp("guard")
    guard.save_pretrained(folder)
    again = Guard.from_pretrained(folder)
    assert same(again, guard) and again.tensors.keys() == guard.tensors.keys()
    fuzz.check_loaded(again, ((folder / CONFIG_FILE).read_bytes(), whole(folder)[1]))


def test_a_file_too_large_to_be_a_guard_is_not_read(folder):
    with (folder / TENSOR_FILE).open("r+b") as stream:
        stream.truncate(3 << 30)  # sparse
    with pytest.raises(GuardError, match="larger"):
        Guard.from_pretrained(folder)
