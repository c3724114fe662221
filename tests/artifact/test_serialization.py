"""The guard artifact: what is written comes back, and nothing else is read."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save

from tests import families, fuzz, tiny
from tests.paths import DOCS
from vlm_safeguard.artifact import config as limits
from vlm_safeguard.artifact import serialization
from vlm_safeguard.artifact.config import Gate, Steering
from vlm_safeguard.artifact.model_card import CARD_FILE
from vlm_safeguard.errors import GuardError
from vlm_safeguard.guard import CONFIG_FILE, TENSOR_FILE, Guard
from vlm_safeguard.model.fingerprint import template_digest
from vlm_safeguard.model.text_only import find_markup

FILES = sorted([CARD_FILE, CONFIG_FILE, TENSOR_FILE])
GATES = [tiny.gate("text", 1, 3, threshold=0.25), tiny.gate("vlm", 2, per_layer=True)]


@pytest.fixture
def made(model):
    return tiny.guard(model, GATES, tokens=3)


@pytest.fixture
def folder(made, tmp_path):
    made.save_pretrained(tmp_path / "guard")
    return tmp_path / "guard"


def edit(folder, **changes):
    """Change top-level keys of guard.json."""
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def put_tensors(folder, tensors):
    """Replace the tensors and their digest, as somebody tampering would."""
    blob = tensors if isinstance(tensors, bytes) else save(tensors)
    (folder / TENSOR_FILE).write_bytes(blob)
    edit(folder, tensors_sha256=hashlib.sha256(blob).hexdigest())


def same(one, other):
    return one.config == other.config and all(
        torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items()
    )


def test_round_trip(made, folder, model):
    loaded = Guard.from_pretrained(folder)
    assert same(loaded, made)
    assert sorted(path.name for path in folder.iterdir()) == FILES
    inputs, logits = tiny.batch(tiny.PROMPTS), []
    for guard in (made, loaded):
        with guard.attach(model), torch.no_grad():
            logits.append(model(**inputs).logits)
    assert torch.equal(*logits)


def test_saving_over_an_older_guard(model, folder):
    newer = tiny.guard(model, GATES, seed=5)
    newer.save_pretrained(folder)
    assert same(Guard.from_pretrained(folder), newer)


def test_erase_is_never_saved_nor_loaded(model, folder, tmp_path):
    with pytest.raises(GuardError, match="never"):
        tiny.guard(model, GATES, mode="erase").save_pretrained(tmp_path / "erase")
    assert not (tmp_path / "erase").exists()
    steering = json.loads((folder / CONFIG_FILE).read_text())["steering"]
    edit(folder, steering=steering | {"mode": "erase"})
    with pytest.raises(GuardError, match="ablation"):
        Guard.from_pretrained(folder)


# -- damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [CONFIG_FILE, TENSOR_FILE])
def test_damaged_files_are_refused(folder, made, name):
    path = folder / name
    whole = path.read_bytes()
    for place in range(0, len(whole) - 1, 97):
        path.write_bytes(whole[:place])
        with pytest.raises(GuardError):
            Guard.from_pretrained(folder)
        flipped = bytes([whole[place] ^ 0x81])
        path.write_bytes(whole[:place] + flipped + whole[place + 1 :])
        if name == TENSOR_FILE:
            with pytest.raises(GuardError):
                Guard.from_pretrained(folder)
        else:  # inside a free text a flip may leave a valid file; it must not raise anything else
            with contextlib.suppress(GuardError):
                Guard.from_pretrained(folder)
    path.write_bytes(whole)
    assert same(Guard.from_pretrained(folder), made)


def test_damaged_tensors_with_a_matching_digest_are_refused(folder):
    whole = (folder / TENSOR_FILE).read_bytes()
    header = int.from_bytes(whole[:8], "little")
    for place in range(0, 8 + header, 31):
        for blob in (whole[:place], whole[:place] + b"\x00" + whole[place + 1 :]):
            put_tensors(folder, blob)
            with pytest.raises(GuardError):
                Guard.from_pretrained(folder)


def test_settings_without_the_digest_of_their_tensors_are_refused(folder):
    for digest in ("", None):
        edit(folder, tensors_sha256=digest)
        with pytest.raises(GuardError, match="tensors_sha256"):
            Guard.from_pretrained(folder)


@pytest.mark.parametrize("missing", [CONFIG_FILE, TENSOR_FILE, None])
def test_missing_files(folder, missing):
    if missing:
        (folder / missing).unlink()
    else:
        shutil.rmtree(folder)
    with pytest.raises(GuardError, match="missing"):
        Guard.from_pretrained(folder)


@pytest.mark.parametrize("name", [CONFIG_FILE, TENSOR_FILE])
def test_files_of_two_guards_are_not_mixed(model, folder, tmp_path, name):
    tiny.guard(model, GATES, seed=7).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / name, folder / name)
    with pytest.raises(GuardError, match="digest"):
        Guard.from_pretrained(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        "1",
        "[" * 100_000,
        '{"schema_version": 1}',
        "\x00",
        "é".encode("latin-1"),
    ],
    ids=range(9),
)
def test_json_that_is_no_guard(folder, text):
    (folder / CONFIG_FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(GuardError):
        Guard.from_pretrained(folder)


@pytest.mark.parametrize("version", [0, 3, "2", None, [2]])
def test_another_schema_names_both_versions(folder, version):
    edit(folder, schema_version=version)
    with pytest.raises(GuardError, match="schema"):
        Guard.from_pretrained(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"surprise": 1},
        {"gates": []},
        {"gates": [{"source": "text", "layers": [1], "thresholds": [0.0, 1.0]}]},
        {"gates": [{"source": "text", "layers": [1, 1], "thresholds": [0.0, 1.0]}]},
        {"gates": [{"source": "text", "layers": [1], "thresholds": [float("nan")]}]},
        {"gates": [{"source": "text", "layers": [1], "thresholds": [float("inf")]}]},
        {"gates": [{"source": "picture", "layers": [1], "thresholds": [0.0]}]},
        {"steering": {"mode": "jailbreak", "layers": [1]}},
        {"steering": {"mode": "restore", "layers": []}},
        {"steering": {"mode": "restore", "layers": [2, 4], "rank": 0}},
        {"steering": {"mode": "restore", "layers": [2, 4], "rank": 2}},
        {"steering": {"mode": "restore", "layers": [2, 4], "rank": 3, "alpha": float("nan")}},
        {"steering": {"mode": "restore", "layers": [2, 99], "rank": 3}},
        {"steering": {"mode": "restore", "layers": [2, 4], "rank": 3, "tokens": 0}},
        {"markup": {"token_ids": []}},
    ],
    ids=lambda changes: json.dumps(changes)[:70],
)
def test_settings_that_make_no_sense_are_refused(folder, changes):
    edit(folder, **changes)
    with pytest.raises(GuardError):
        Guard.from_pretrained(folder)


@pytest.mark.parametrize("reference", ["text", "anchor"])
@pytest.mark.parametrize("size", [0.0, 1e-6])
def test_erase_under_the_name_of_restore_is_refused(model, size, reference):
    sound = tiny.guard(model, GATES, reference=reference)
    tensors = sound.tensors | {"anchor.2": torch.full((3,), size)}
    with pytest.raises(GuardError, match="anchor of layer 2 is zero"):
        Guard(sound.config, tensors)
    added = tiny.guard(model, GATES, mode="add", query="pass")  # has no use for its anchors
    Guard(added.config, added.tensors | {"anchor.2": torch.zeros(3)})


@pytest.mark.parametrize(
    ("gate", "steering"),
    [
        (tiny.gate("vlm", 1, 5), {"tokens": 1}),
        (tiny.gate("vlm", 5), {"tokens": 1, "positions": "all"}),
        (tiny.gate("vlm", 3, per_layer=True), {}),
        (tiny.gate("text", 1, 3, per_layer=True), {"tokens": 1}),
    ],
)
def test_a_gate_that_could_never_steer_is_refused(model, gate, steering):
    reachable = tiny.gate("text", 5)
    with pytest.raises(ValidationError, match="gate 1 "):
        tiny.guard(model, [reachable, gate], **steering)


@pytest.mark.parametrize(
    ("gate", "steering"),
    [
        (tiny.gate("vlm", 5), {"tokens": 2}),
        (tiny.gate("vlm", 1, 4), {"tokens": 1}),
        (tiny.gate("vlm", 4, per_layer=True), {"tokens": 1}),
        (tiny.gate("text", 5), {"tokens": 1}),
    ],
)
def test_a_gate_that_is_taken_does_steer(model, gate, steering):
    made = tiny.with_thresholds(tiny.guard(model, [gate], **steering), [[-1e9] * len(gate.layers)])
    with made.attach(model) as session:
        model.generate(**tiny.batch(tiny.PROMPTS), max_new_tokens=3)
        assert all(row.decision.fired and row.changed for row in session.attestation.rows)


def test_a_gate_without_thresholds_is_refused():
    with pytest.raises(ValidationError, match="threshold"):
        Gate(source="text", layers=[1], thresholds=[])


def test_steering_without_layers_is_refused():
    with pytest.raises(ValidationError, match="layers"):
        Steering(mode="restore", layers=[])


def test_modes_and_kinds_that_nobody_registered_are_refused(model):
    with pytest.raises(GuardError, match=r"unknown steering mode 'defer'.* restore, add, erase"):
        tiny.guard(model, [tiny.gate("text", 2)], mode="defer")
    odd = Gate(kind="odd", source="text", layers=[2], thresholds=[0.0])
    with pytest.raises(GuardError, match=r"unknown kind of gate 'odd'.* linear"):
        tiny.guard(model, [odd])


def as_schema_1(guard, **steering):
    """``guard.json`` and ``guard.safetensors`` as schema 1 had them."""
    _, settings, blob = serialization.render(guard.config, guard.tensors)
    raw = json.loads(settings)
    for gate in raw["gates"]:
        del gate["kind"]
    raw |= {"schema_version": 1, "steering": raw["steering"] | {"soft": 0.0} | steering}
    return json.dumps(raw).encode(), blob


def test_a_guard_of_schema_1_loads(model):
    made = tiny.guard(model, [tiny.gate("text", 2), tiny.gate("vlm", 3)])
    loaded = Guard.from_bytes(*as_schema_1(made))
    assert loaded.config.steering == made.config.steering
    assert loaded.config.gates == made.config.gates
    assert all(torch.equal(loaded.tensors[name], made.tensors[name]) for name in made.tensors)


@pytest.mark.parametrize(
    ("steering", "what"),
    [({"soft": 2.5}, "soft gates"), ({"mode": "defer", "layers": []}, "the mode `defer`")],
)
def test_a_guard_of_schema_1_that_uses_what_is_gone_is_refused(model, steering, what):
    made = tiny.guard(model, [tiny.gate("text", 2)])
    with pytest.raises(GuardError, match=f"{what}.*calibrate again with `vlm-safeguard calibrate"):
        Guard.from_bytes(*as_schema_1(made, **steering))


def _change(name, change):
    def apply(tensors):
        return tensors | {name: change(tensors[name])}

    return apply


@pytest.mark.parametrize(
    "tamper",
    [
        _change("directions.2", lambda t: t * torch.nan),
        _change("gate.0", lambda t: t * torch.inf),
        _change("directions.2", lambda t: 2 * t),
        _change("directions.2", lambda t: t[[0, 0, 1]]),
        _change("directions.2", lambda t: t[:2]),
        _change("directions.2", lambda t: t.half()),
        _change("anchor.4", lambda t: t.double()),
        lambda tensors: tensors | {"more": torch.zeros(1)},
        lambda tensors: {k: v for k, v in tensors.items() if k != "anchor.2"},
        lambda tensors: {},
    ],
    ids=range(10),
)
def test_tampered_tensors_are_refused(folder, tamper):
    put_tensors(folder, tamper(load_file(folder / TENSOR_FILE)))
    with pytest.raises(GuardError):
        Guard.from_pretrained(folder)


def _socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))


@pytest.mark.parametrize("name", [CONFIG_FILE, TENSOR_FILE])
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (Path.mkdir, "folder, not a file"),
        (os.mkfifo, "pipe, socket or device"),
        (_socket, "pipe, socket or device"),
        (lambda path: path.symlink_to("/dev/zero"), "pipe, socket or device"),
        (lambda path: path.symlink_to(path.parent), "folder, not a file"),
        (lambda path: path.symlink_to("nowhere"), "broken link"),
        (lambda path: path.symlink_to(path.name), "cannot be read"),
    ],
    ids=["folder", "fifo", "socket", "device", "link to folder", "dead link", "loop"],
)
def test_something_else_in_place_of_a_file(folder, monkeypatch, name, make, said):
    monkeypatch.chdir(folder)
    (folder / name).unlink()
    make(folder / name)
    with pytest.raises(GuardError, match=said):
        Guard.from_pretrained(folder)


@pytest.mark.parametrize("name", [CONFIG_FILE, TENSOR_FILE])
def test_a_link_to_a_file_is_followed_and_never_written_through(made, folder, tmp_path, name):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert same(Guard.from_pretrained(folder), made)
    before = (tmp_path / "elsewhere").read_bytes()
    made.save_pretrained(folder)
    assert not (folder / name).is_symlink()
    assert (tmp_path / "elsewhere").read_bytes() == before


def test_a_folder_that_may_not_be_read(folder, monkeypatch):
    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(GuardError, match="Permission denied"):
        Guard.from_pretrained(folder)


# -- strict JSON and the limits of docs/guard-format.md ------------------------------------------


def whole(folder):
    return (folder / CONFIG_FILE).read_text(), (folder / TENSOR_FILE).read_bytes()


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


# -- any guard there is comes back ---------------------------------------------------------------


@st.composite
def guards(draw):
    depth, width = draw(st.integers(1, 8)), draw(st.integers(1, 12))
    rank = draw(st.integers(1, width))
    some = st.lists(st.integers(0, depth - 1), min_size=1, unique=True)
    mode = draw(st.sampled_from(["add", "restore"]))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    steered = draw(some)
    tokens = draw(st.none() | st.integers(1, 10**6))
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
        gates.append(Gate(source=source, layers=layers, thresholds=cuts, per_layer=alone))
        tensors[f"gate.{index}"] = torch.randn(len(layers), width, generator=generator)
    steering = Steering(
        mode=mode,
        layers=steered,
        rank=rank,
        alpha=draw(st.floats(0, 1e4)),
        tokens=tokens,
        reference=draw(st.sampled_from(["text", "anchor"])),
        query=draw(st.sampled_from(["pass", "text"])),
        positions=draw(st.sampled_from(["generated", "all"])),
    )
    for layer in steering.layers:
        square = torch.randn(width, width, generator=generator, dtype=torch.float64)
        tensors[f"directions.{layer}"] = torch.linalg.qr(square)[0][:rank].float()
        tensors[f"anchor.{layer}"] = torch.randn(rank, generator=generator)
    letters = st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"))
    digest = st.text("0123456789abcdef", min_size=64, max_size=64)
    leaves = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(letters)
    leaves |= st.floats(allow_nan=False, allow_infinity=False)
    inner = st.recursive(
        leaves, lambda s: st.lists(s) | st.dictionaries(st.text(letters), s), max_leaves=8
    )
    record = draw(st.dictionaries(st.text(letters).filter("budget".__ne__), inner, max_size=4))
    config = limits.GuardConfig(
        model=limits.ModelIdentity(
            name=draw(st.text(letters, max_size=256)),
            config_sha256=draw(digest),
            weights_sha256=draw(digest),
            template_sha256=draw(st.just("") | digest),
            dtype=draw(st.sampled_from(["", "float32", "bfloat16", "float16"])),
            hidden_size=width,
            layers=depth,
        ),
        markup=limits.Markup(token_ids=draw(st.lists(st.integers(0, 2**31 - 1), min_size=1))),
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


# -- a failing disk ----------------------------------------------------------------------------


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("function", ["fsync", "replace", "fdopen"])
def test_a_failing_disk_breaks_nothing_silently(model, made, folder, monkeypatch, function, call):
    real, calls = getattr(os, function), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    newer = tiny.guard(model, GATES, seed=5)
    with monkeypatch.context() as patch:
        patch.setattr(os, function, failing)
        with pytest.raises(GuardError, match="No space left"):
            newer.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == FILES
    if (function, call) == ("replace", 2):  # the one gap: new tensors, old settings. Noticed.
        with pytest.raises(GuardError, match="digest"):
            Guard.from_pretrained(folder)
    else:
        assert same(Guard.from_pretrained(folder), made)
    newer.save_pretrained(folder)
    assert same(Guard.from_pretrained(folder), newer)


def test_a_record_with_nan_is_refused_before_anything_is_written(made, tmp_path):
    config = made.config.model_copy(update={"calibration": {"auc": float("nan")}})
    with pytest.raises(GuardError, match="NaN"):
        Guard(config, made.tensors).save_pretrained(tmp_path / "guard")
    assert not (tmp_path / "guard").exists()


@pytest.mark.parametrize("record", [{"x": "y" * 5000}, {"x": object()}, {"x": "\ud800"}])
def test_what_could_not_be_loaded_is_not_saved(made, tmp_path, record):
    config = made.config.model_copy(update={"calibration": record})
    with pytest.raises(GuardError):
        Guard(config, made.tensors).save_pretrained(tmp_path / "guard")
    assert not (tmp_path / "guard").exists()


def test_a_target_that_is_a_file(made, tmp_path):
    (tmp_path / "guard").write_text("")
    with pytest.raises(GuardError, match="cannot write"):
        made.save_pretrained(tmp_path / "guard")


# -- another model -----------------------------------------------------------------------------


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
    markup = found.settings(made.config.markup.pad_id)
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
