"""A checkpoint loads only if its tensors are those of the model."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import checkpoint
from tests.command import run
from vlm_safeguard import load
from vlm_safeguard.cli.commands import app
from vlm_safeguard.errors import ModelError
from vlm_safeguard.model.checkpoint import read_model
from vlm_safeguard.model.loading import LoadedModel

# By their names in the checkpoint, and in the model.
UP = "language_model.model.layers.2.mlp.up_proj.weight"
UP_IN_MODEL = "model.language_model.layers.2.mlp.up_proj.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"
EMBEDDING_IN_MODEL = "model.language_model.embed_tokens.weight"
Weights = dict[str, Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoint.save(tmp_path / "model")


def change(folder: Path, edit: Callable[[Weights], object]) -> Path:
    """Write the weights of a checkpoint anew."""
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def message(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load(folder)
    return str(caught.value)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    said = message(change(folder, lambda weights: weights.pop(UP)))
    assert f"do not fit LlavaForConditionalGeneration: tensors 1 missing ({UP_IN_MODEL})." in said
    assert "unexpected" not in said and "another shape" not in said


def test_an_unexpected_tensor_is_named(folder: Path) -> None:
    said = message(change(folder, lambda weights: weights.update({"extra.0": torch.ones(2)})))
    assert "tensors 1 unexpected (extra.0)." in said


def test_a_tensor_of_another_shape_is_named_with_both(folder: Path) -> None:
    said = message(change(folder, lambda weights: weights.update({UP: torch.ones(3, 5)})))
    assert f"tensors 1 of another shape ({UP_IN_MODEL} (3, 5) instead of (48, 32))." in said


def test_of_many_the_first_are_named_and_all_are_counted(folder: Path) -> None:
    def edit(weights: Weights) -> None:
        for name in [name for name in weights if ".layers.3.mlp." in name]:
            del weights[name]
        weights |= {f"extra.{number}": torch.ones(2) for number in range(5)}

    said = message(change(folder, edit))
    layer = "model.language_model.layers.3.mlp"
    names = ", ".join(f"{layer}.{part}_proj.weight" for part in ("down", "gate", "up"))
    assert f"tensors 3 missing ({names}), 5 unexpected (extra.0, extra.1, extra.2, ...)." in said


COMMANDS = {
    "doctor": ["MODEL"],
    "calibrate": ["MODEL", "-o", "out"],
    "generate": ["MODEL", "--prompt", "Hi", "--guard", "embedded"],
    "evaluate": ["MODEL", "-o", "out", "--benchmark", "own_malicious", "--defence", "none"],
    "gap": ["MODEL", "-o", "out"],
    "gates": ["MODEL"],
    "serve": ["MODEL", "--guard", "embedded", "--port", "0"],
    "batch": ["requests.jsonl", "MODEL", "-o", "answers.jsonl", "--guard", "embedded"],
    "playground": ["MODEL", "--guard", "embedded", "--port", "0"],
}


def test_all_commands_that_load_a_model_are_known() -> None:
    group: Any = typer.main.get_command(app)
    loading = {
        name
        for name, command in group.commands.items()
        if any("--trust-remote-code" in one.opts for one in command.params)
    }
    assert loading == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_refuse_it_too(
    command: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [logging.NullHandler()])  # serve makes its own
    change(folder, lambda weights: weights.pop(UP))
    body = {"model": str(folder), "messages": [{"role": "user", "content": "Hi"}]}
    task = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (tmp_path / "requests.jsonl").write_text(json.dumps(task) + "\n")
    given = [str(folder) if one == "MODEL" else one for one in COMMANDS[command]]
    done = run(command, *given, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert UP_IN_MODEL in "".join(done.stderr.split("\n"))
    assert not (tmp_path / "answers.jsonl").exists() and not list(tmp_path.glob("out/*.json"))


def test_a_tied_tensor_may_be_absent_but_not_the_one_it_is_tied_to(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path / "tied", tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    assert EMBEDDING in weights and not any("lm_head" in name for name in weights)
    model = load(folder).model
    assert torch.equal(model.lm_head.weight, weights[EMBEDDING])
    said = message(change(folder, lambda weights: weights.pop(EMBEDDING)))
    assert EMBEDDING_IN_MODEL in said


def test_an_untied_head_may_not_be_absent(folder: Path) -> None:
    said = message(change(folder, lambda weights: weights.pop("language_model.lm_head.weight")))
    assert "tensors 1 missing (lm_head.weight)." in said


def test_buffers_of_old_checkpoints_are_ignored(folder: Path) -> None:
    def edit(weights: Weights) -> None:
        layer = "language_model.model.layers.0.self_attn"
        weights[f"{layer}.rotary_emb.inv_freq"] = torch.ones(4)
        tower = next(name for name in weights if name.endswith("embeddings.class_embedding"))
        weights[tower.replace("class_embedding", "position_ids")] = torch.arange(5)[None]

    before = load(folder).model.state_dict()
    after = load(change(folder, edit)).model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_every_family_reads_its_own_checkpoint(loaded: LoadedModel, tmp_path: Path) -> None:
    loaded.model.save_pretrained(tmp_path)
    model = read_model(str(tmp_path))
    saved = loaded.model.state_dict()
    assert type(model) is type(loaded.model) and model.state_dict().keys() == saved.keys()
    for name, values in model.state_dict().items():
        assert torch.equal(values, saved[name]), name
