"""The guard artifact: what is written comes back, and nothing damaged is read."""

import contextlib
import json
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.artifact.files import FILES, GATES, edit, put_tensors, same
from vlm_safeguard.artifact import serialization
from vlm_safeguard.errors import GuardError
from vlm_safeguard.guard import CONFIG_FILE, TENSOR_FILE, Guard


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


SCHEMA_1 = Path(__file__).parent / "schema_1"  # written by a version that had it


def test_a_stored_guard_of_schema_1_loads():
    folder = SCHEMA_1 / "restore"
    assert json.loads((folder / CONFIG_FILE).read_text())["schema_version"] == 1
    guard, stored = Guard.from_pretrained(folder), load_file(folder / TENSOR_FILE)
    assert (guard.config.steering.mode, guard.config.steering.layers) == ("restore", [2, 3])
    assert [gate.kind for gate in guard.config.gates] == ["linear", "linear"]
    assert guard.tensors.keys() == stored.keys()
    assert all(torch.equal(guard.tensors[name], stored[name]) for name in stored)


@pytest.mark.parametrize(("name", "what"), [("soft", "soft gates"), ("defer", "the mode `defer`")])
def test_a_stored_guard_of_schema_1_that_uses_what_is_gone_is_refused(name, what):
    with pytest.raises(GuardError, match=f"{what}.*calibrate again with `vlm-safeguard calibrate"):
        Guard.from_pretrained(SCHEMA_1 / name)


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


@pytest.mark.skipif(sys.platform == "win32", reason="has no pipes or devices among files")
@pytest.mark.parametrize("name", [CONFIG_FILE, TENSOR_FILE])
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (Path.mkdir, "folder, not a file"),
        (lambda path: os.mkfifo(path), "pipe, socket or device"),
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
