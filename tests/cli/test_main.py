"""The command line on bad input: a clear error, exit code 1, nothing written, no traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command import run, run_apart


@pytest.fixture
def text_only_model(tmp_path: Path) -> Path:
    folder = tmp_path / "text-model"
    folder.mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["calibrate", "./nowhere", "-o", "g"], "there is no model folder ./nowhere"),
        (["calibrate", "text-model", "-o", "g"], "takes no images"),
        (["calibrate", "empty", "-o", "g"], "without config.json"),
        (["calibrate", "notes.txt", "-o", "g"], "is a file: name the model's folder"),
        (["calibrate", "text-model", "-o", "notes.txt"], "notes.txt is a file"),
        (["calibrate", "text-model", "-o", "g", "--states", "notes.txt"], "cannot write to notes"),
        (["doctor", "text-model", "noguard"], "not a guard folder: guard.json is missing"),
        (["generate", "text-model", "--prompt", "  "], "the prompt is empty"),
        (["generate", "text-model", "--prompt", "x", "--image", "no.png"], "no.png"),
        (["generate", "text-model", "--prompt", "x", "--image", "notes.txt"], "not a PNG"),
        (["calibrate", "text-model", "-o", "g", "--dtype", "int3"], "unknown dtype 'int3'"),
        (["doctor", "text-model", "--quantization", "2bit"], "unknown quantization '2bit'"),
        (["doctor", "text-model", "--revision", "v1"], "only models on the hub have revisions"),
        (["doctor", "text-model", "--device", "cpu", "--device-map", "auto"], "exclude each other"),
        (["calibrate", "text-model", "-o", "g/h/i"], "takes no images"),
        (["generate", "text-model", "--prompt", "x", "--device", "abacus"], "device 'abacus'"),
        (["gates", "text-model", "-o", "empty"], "is a folder"),
        (["gates", "text-model", "-o", "notes.txt/page.md"], "cannot write to notes.txt"),
        (["evaluate", "m", "-o", "g", "--defence-text", "notes.txt"], "give NAME=FILE"),
        (["demo", "-o", "notes.txt"], "cannot write the report"),
        (["demo", "--prompts", "missing.txt"], "cannot read the prompts missing.txt"),
    ],
)
def test_bad_input(
    arguments: list[str], message: str, text_only_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("just words")
    done = run(*arguments, cwd=tmp_path)
    said = " ".join(done.stderr.split())
    assert done.returncode == 1, said
    assert message in said and "Traceback" not in said
    assert done.stdout == ""
    assert not (tmp_path / "g").exists()


def test_help_is_quick_and_names_every_command(tmp_path: Path) -> None:
    done = run_apart("--help", cwd=tmp_path)
    assert done.returncode == 0
    names = "assemble calibrate doctor generate demo evaluate gap validate-judge check-results"
    for command in names.split():
        assert command in done.stdout


def test_an_error_ends_the_process(tmp_path: Path) -> None:
    done = run_apart("audit", "nowhere.jsonl", cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "\nerror: no audit log at nowhere.jsonl\n"
