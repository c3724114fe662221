"""Every command that loads a model offers the same options and hands them to ``load``."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from vlm_safeguard.calibration import calibrate as calibrating
from vlm_safeguard.calibration.budget import Effort
from vlm_safeguard.cli.commands import app
from vlm_safeguard.cli.options import read_guard
from vlm_safeguard.data import ocr
from vlm_safeguard.embedded import assemble as assembling
from vlm_safeguard.errors import CalibrationError, GuardError, ModelError, SafeguardError
from vlm_safeguard.evaluation.studies import gate_forms
from vlm_safeguard.model import loading

FLAGS = {
    "--dtype",
    "--device",
    "--device-map",
    "--revision",
    "--quantization",
    "--attn-implementation",
    "--trust-remote-code",
    "--local-files-only",
}


COMMANDS = ["calibrate", "doctor", "generate", "evaluate", "gap", "gates"]
COMMANDS += ["serve", "batch", "playground"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_loads_a_model_has_all_options(name: str) -> None:
    command: Any = typer.main.get_command(app)
    flags = {flag for option in command.commands[name].params for flag in option.opts}
    assert flags >= FLAGS


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {"dtype": "auto", "device": "auto"}),
        (
            ["--dtype", "bfloat16", "--device-map", "auto", "--revision", "v1"],
            {"dtype": "bfloat16", "device": "auto", "device_map": "auto", "revision": "v1"},
        ),
        (
            ["--device", "cuda:1", "--quantization", "4bit", "--attn-implementation", "eager"],
            {
                "dtype": "auto",
                "device": "cuda:1",
                "quantization": "4bit",
                "attn_implementation": "eager",
            },
        ),
        (
            ["--trust-remote-code", "--local-files-only"],
            {
                "dtype": "auto",
                "device": "auto",
                "trust_remote_code": True,
                "local_files_only": True,
            },
        ),
    ],
)
def test_options_reach_load(
    arguments: list[str], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def load(name: str, **options: Any) -> None:
        given.update(options)
        raise ModelError("that is all")

    monkeypatch.setattr(loading, "load", load)
    result = CliRunner().invoke(app, ["doctor", "someone/model", *arguments])
    assert isinstance(result.exception, ModelError) and given == expected


@pytest.mark.parametrize(
    "arguments",
    [
        ["calibrate", "nowhere", "--read-pictures", "-o", "made"],
        ["doctor", "nowhere", "embedded"],
        ["generate", "nowhere", "--guard", "embedded", "--prompt", "Hi", "--image", "dot.png"],
        ["gap", "nowhere", "--guard", "embedded", "-o", "made"],
        ["gates", "nowhere", "--read-pictures"],
        ["playground", "nowhere", "--guard", "embedded", "--port", "0"],
    ],
)
def test_missing_ocr_is_found_before_a_model_is_loaded(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ocr, "find_spec", lambda _: None)
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("dot.png")
    found = CliRunner().invoke(app, arguments)
    assert isinstance(found.exception, SafeguardError)
    assert "pip install 'vlm-safeguard[ocr]'" in str(found.exception)


def test_a_question_without_a_picture_needs_no_ocr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ocr, "find_spec", lambda _: None)
    guard = read_guard("embedded", pictures=False)
    assert guard.config.reads_pictures


@pytest.mark.parametrize(
    ("given", "expected"), [([], "highest"), (["--matmul-precision", "medium"], "medium")]
)
def test_calibration_multiplies_as_precisely_as_asked(
    given: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done: list[str] = []

    def run(*_: Any, matmul_precision: str, **__: Any) -> None:
        done.append(matmul_precision)
        raise CalibrationError("that is all")

    monkeypatch.setattr(loading, "load", lambda *_, **__: None)
    monkeypatch.setattr(calibrating, "calibrate", run)
    output = str(tmp_path / "guard")
    result = CliRunner().invoke(app, ["calibrate", "someone/model", "-o", output, *given])
    assert isinstance(result.exception, CalibrationError) and done == [expected]


def test_the_study_of_gates_takes_what_a_calibration_with_these_options_keeps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done: list[Any] = []

    def study(_: Any, __: Any, effort: Effort, ___: Any, **given: Any) -> None:
        done.append((effort, given))
        raise CalibrationError("that is all")

    monkeypatch.setattr(loading, "load", lambda *_, **__: None)
    monkeypatch.setattr(ocr, "find_spec", lambda _: object())
    monkeypatch.setattr(gate_forms, "study", study)
    options = ["--quick", "--read-pictures", "--states", str(tmp_path)]
    for given in ([], [*options, "--matmul-precision", "medium"]):
        result = CliRunner().invoke(app, ["gates", "someone/model", *given])
        assert isinstance(result.exception, CalibrationError)
    own: dict[str, Any] = {"reads_pictures": False, "states": None, "matmul_precision": "highest"}
    kept = {"reads_pictures": True, "states": tmp_path, "matmul_precision": "medium"}
    assert done == [(Effort(), own), (Effort.quick(), kept)]


@pytest.mark.parametrize("command", ["serve", "playground", "batch"])
def test_a_model_without_a_guard_that_ships_needs_one_named(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before anything is fetched."""
    bare = replace(assembling.MODELS["embedded"], name="embedded-9b", own="nowhere")
    monkeypatch.setitem(assembling.MODELS, bare.name, bare)
    monkeypatch.setattr(assembling, "assemble", lambda *_, **__: pytest.fail("it was assembled"))
    (tmp_path / "requests.jsonl").write_text("{}")
    files = [str(tmp_path / "requests.jsonl")] if command == "batch" else []
    output = ["-o", str(tmp_path / "answers.jsonl")] if command == "batch" else []
    result = CliRunner().invoke(app, [command, *files, "embedded-9b", *output])
    said = r"no guard ships for the model 'embedded-9b': make one with `.*calibrate embedded-9b"
    assert isinstance(result.exception, GuardError) and re.search(said, str(result.exception))
