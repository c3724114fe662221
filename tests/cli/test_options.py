"""Every command that loads a model offers the same options and hands them to ``load``."""

from __future__ import annotations

from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from vlm_safeguard.cli.commands import app
from vlm_safeguard.errors import ModelError
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
