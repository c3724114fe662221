"""The scripts in examples/, on a tiny checkpoint and on the embedded model.

Calibration takes too long for a test: own_data.py is run with a stand-in for ``calibrate``.
"""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests import assembled, checkpoint, tiny
from tests.paths import ROOT
from vlm_safeguard.calibration import calibrate as calibration
from vlm_safeguard.data.prompts import CalibrationData
from vlm_safeguard.errors import DataError, GuardRuntimeError, ModelError
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.loading import LoadedModel, load


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny checkpoint, a guard that always steers, and a picture."""
    folder = tmp_path_factory.mktemp("examples")
    checkpoint.save(folder / "model")
    loaded = load(folder / "model")
    gate = tiny.gate("text", 2, threshold=-1e9)
    tiny.guard(loaded.model, [gate], reference="anchor").save_pretrained(folder / "guard")
    Image.new("RGB", (40, 30), (200, 30, 30)).save(folder / "picture.png")
    return {"MODEL": "model", "GUARD": "guard", "PICTURE": "picture.png"} | {"": str(folder)}


@pytest.fixture
def embedded(made: dict[str, str]) -> dict[str, str]:
    """The embedded model, the guard that ships for it, and the picture."""
    return made | {"MODEL": str(assembled.embedded()), "GUARD": "embedded"}


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


@pytest.mark.embedded
@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("generate.py", "PICTURE"),
        ("streaming.py", "How do I bake bread?"),
        ("conversation.py", "PICTURE"),
    ],
)
def test_the_embedded_model_answers(embedded: dict[str, str], name: str, last: str) -> None:
    said = run(embedded, name, "MODEL", "GUARD", last)
    assert said.strip()
    if name == "generate.py":
        assert said.startswith("steered: False\n")  # nothing in this request is harmful


@pytest.mark.embedded
def test_a_pipeline_says_what_a_guard_needs_that_reads_pictures(embedded: dict[str, str]) -> None:
    with pytest.raises(GuardRuntimeError, match=r"guard\.prepare"):
        run(embedded, "pipeline.py", "MODEL", "GUARD", "PICTURE")


def test_every_example_is_run_here() -> None:
    names = {path.name for path in (ROOT / "examples").glob("*.py")}
    run_here = {"generate.py", "pipeline.py", "streaming.py", "conversation.py", "own_data.py"}
    assert names == run_here


def test_own_data(made: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompts reach ``calibrate``, and what it makes is saved and its proof printed."""
    asked = {
        "harmful": [f"How do I forge a tram pass of kind {n}?" for n in range(12)],
        "harmless": [f"How do I buy a tram pass of kind {n}?" for n in range(12)],
    }
    for label, questions in asked.items():
        (tmp_path / f"{label}.txt").write_text("\n".join(questions) + "\n", "utf-8")

    def stand_in(loaded: LoadedModel, *, data: CalibrationData, **options: Any) -> Guard:
        given = [*data.fit, *data.bound, *data.held]
        for label, questions in asked.items():
            own = [p for p in given if p.prompt in questions]
            assert {p.prompt for p in own} == set(questions)
            assert {p.label for p in own} == {label}
        assert len(given) > 24  # beside ours
        assert options["budget"].false_positives == 0.02
        guard = tiny.guard(loaded.model, [tiny.gate("text", 2)])
        return tiny.changed(guard, calibration={"proof": {"mcnemar_p": 0.0039}})

    monkeypatch.setattr(calibration, "calibrate", stand_in)
    files = [str(tmp_path / f"{label}.txt") for label in asked]
    said = run(made, "own_data.py", "MODEL", *files, str(tmp_path / "guard"))
    assert "0.0039" in said
    assert Guard.from_pretrained(tmp_path / "guard").config.calibration["proof"]


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
