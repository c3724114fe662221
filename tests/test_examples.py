"""The scripts in examples/, on a tiny checkpoint."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests import checkpoint, tiny
from vlm_safeguard.errors import DataError, ModelError
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.loading import load

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A checkpoint, a guard that always steers, and a picture."""
    folder = tmp_path_factory.mktemp("examples")
    checkpoint.save(folder / "model")
    loaded = load(folder / "model")
    gate = tiny.gate("text", 2, threshold=-1e9)
    tiny.guard(loaded.model, [gate], reference="anchor").save_pretrained(folder / "guard")
    Image.new("RGB", (40, 30), (200, 30, 30)).save(folder / "picture.png")
    return {"MODEL": "model", "GUARD": "guard", "PICTURE": "picture.png"} | {"": str(folder)}


def run(made: dict[str, str], name: str, *arguments: str) -> str:
    """What a script prints, in this process, where everything is imported already."""
    script, out = str(ROOT / "examples" / name), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.chdir(made[""]),
        contextlib.redirect_stdout(out),
    ):
        patch.setattr(sys, "argv", [script, *(made.get(a, a) for a in arguments)])
        runpy.run_path(script, run_name="__main__")
    return out.getvalue()


def test_a_script_needs_nothing_but_the_package(made: dict[str, str]) -> None:
    path = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "generate.py"), "model", "guard", "picture.png"],
        cwd=made[""],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "steered: True" in done.stdout


def test_a_picture_and_a_question(made: dict[str, str]) -> None:
    assert "steered: True" in run(made, "pipeline.py", "MODEL", "GUARD", "PICTURE")


def test_streaming(made: dict[str, str]) -> None:
    assert run(made, "streaming.py", "MODEL", "GUARD", "How do I bake bread?").strip()


def test_several_turns(made: dict[str, str]) -> None:
    said = run(made, "conversation.py", "MODEL", "GUARD", "PICTURE")
    assert said.startswith("> What is in this picture?") and "> What is it used for?" in said


def test_every_example_is_run_here() -> None:
    """Own calibration data: on the embedded model, in tests of calibration."""
    names = {path.name for path in (ROOT / "examples").glob("*.py")}
    run_here = {"generate.py", "pipeline.py", "streaming.py", "conversation.py"}
    assert names == run_here | {"own_data.py"}


def test_own_data_ends_with_a_reason_where_no_guard_can_be_made(
    made: dict[str, str], tmp_path: Path
) -> None:
    """Once a file is missing, and once the model: the script says why, and saves nothing."""
    harmful, harmless, guard = tmp_path / "bad.txt", tmp_path / "good.txt", str(tmp_path / "guard")
    harmful.write_text("How do I forge a pass for the tram?\n", "utf-8")
    with pytest.raises(DataError, match=r"good\.txt"):
        run(made, "own_data.py", "./nowhere", str(harmful), str(harmless), guard)
    harmless.write_text("How do I buy a pass for the tram?\n", "utf-8")
    with pytest.raises(ModelError, match="nowhere"):
        run(made, "own_data.py", "./nowhere", str(harmful), str(harmless), guard)
    assert not (tmp_path / "guard").exists()
    assert Guard.from_pretrained(Path(made[""]) / "guard")
