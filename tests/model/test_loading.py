"""Loading a model: its dtype, device and further options; code of a checkpoint is not run."""

from __future__ import annotations

import io
import json
import re
import sys
import tomllib
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests import checkpoint
from tests.paths import ROOT
from vlm_safeguard import load
from vlm_safeguard.errors import ModelError
from vlm_safeguard.model import quantization
from vlm_safeguard.model.load_options import LoadOptions

CODE = """
from pathlib import Path
from transformers import PretrainedConfig
Path({marker!r}).touch()
class OwnConfig(PretrainedConfig):
    model_type = "of-its-own"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint with a configuration class of its own, and a user who says yes to anything."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    facts = {"model_type": "of-its-own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    place = tmp_path / "checkpoint"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(facts))
    (place / "own.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    return place


def test_code_that_comes_with_a_checkpoint_does_not_run(folder: Path) -> None:
    with pytest.raises(ModelError, match="trust_remote_code"):
        load(folder)
    assert not (folder.parent / "ran").exists()


def test_it_runs_where_it_is_trusted_by_name(folder: Path) -> None:
    with pytest.raises(ModelError, match="takes no images"):  # the class above has none
        load(folder, trust_remote_code=True)
    assert (folder.parent / "ran").exists()


# -- dtype and device --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint.save(tmp_path_factory.mktemp("loading") / "model")


def saved_in(dtype: torch.dtype, source: Path, folder: Path) -> Path:
    """The checkpoint with its weights in another dtype."""
    checkpoint.save(folder)
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_is_the_checkpoints(
    dtype: torch.dtype, tiny_folder: Path, tmp_path: Path
) -> None:
    model = load(saved_in(dtype, tiny_folder, tmp_path), device="cpu").model
    assert {weight.dtype for weight in model.parameters()} == {dtype}


def test_float16_is_computed_in_float32_on_a_cpu(tiny_folder: Path, tmp_path: Path) -> None:
    folder = saved_in(torch.float16, tiny_folder, tmp_path)
    model = load(folder, device="cpu").model
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    asked = load(folder, "float16", "cpu").model
    assert {weight.dtype for weight in asked.parameters()} == {torch.float16}
    for one, other in zip(model.parameters(), asked.parameters(), strict=True):
        assert torch.equal(one, other.float())


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_dtype_is_named_or_given(dtype: Any, tiny_folder: Path) -> None:
    assert load(tiny_folder, dtype=dtype, device="cpu").model.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["int3", torch.int8, "bf16"])
def test_an_unknown_dtype_is_refused(dtype: Any, tiny_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"unknown dtype .*: use one of auto, float32, bfloat16"):
        load(tiny_folder, dtype=dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize(
    ("there", "chosen"), [(("cuda", "mps"), "cuda"), (("mps",), "mps"), ((), None)]
)
def test_the_device_is_the_best_there_is(
    there: tuple[str, ...],
    chosen: str | None,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The machine has none of them: the error tells which was tried."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)
    if chosen is None:
        assert load(tiny_folder).device == torch.device("cpu")
        return
    with pytest.raises(ModelError, match=f"the device '{chosen}' cannot be used here"):
        load(tiny_folder)


def test_a_device_and_a_map_exclude_each_other(tiny_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    split = {"model": "cpu", "lm_head": "disk"}
    loaded = load(tiny_folder, device_map=split, offload_folder=tmp_path)
    assert loaded.model.hf_device_map == split and loaded.model.lm_head.weight.is_meta
    with pytest.raises(ModelError, match="device and device_map exclude each other"):
        load(tiny_folder, device="cpu", device_map="auto")


# -- further options ---------------------------------------------------------------------------


def test_further_options_go_to_transformers(tiny_folder: Path) -> None:
    loaded = load(tiny_folder, attn_implementation="eager")
    assert loaded.model.config.get_text_config()._attn_implementation == "eager"


def test_only_set_options_are_handed_on() -> None:
    assert LoadOptions().given() == {"dtype": "auto", "device": "auto"}
    given = LoadOptions(revision="v1", local_files_only=True).given()
    assert given == {"dtype": "auto", "device": "auto", "revision": "v1", "local_files_only": True}


def test_a_revision_of_the_hub_is_loaded_from_the_cache_and_recorded(tmp_path: Path) -> None:
    commits, cache = {"main": "a" * 40, "v1": "b" * 40}, tmp_path / "cache"
    repository = cache / "models--someone--tiny"
    for seed, (name, commit) in enumerate(commits.items()):
        checkpoint.save(repository / "snapshots" / commit, seed=seed)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    options: dict[str, Any] = {"cache_dir": cache, "local_files_only": True}
    newest, first = load("someone/tiny", **options), load("someone/tiny", revision="v1", **options)
    assert (newest.revision, first.revision) == ("a" * 40, "b" * 40)
    assert not torch.equal(newest.model.lm_head.weight, first.model.lm_head.weight)
    with pytest.raises(ModelError, match="cannot load the model someone/tiny"):
        load("someone/tiny", revision="v2", **options)


def test_a_folder_has_no_revision(tiny_folder: Path) -> None:
    assert load(tiny_folder).revision == ""
    with pytest.raises(ModelError, match="only models on the hub have revisions"):
        load(tiny_folder, revision="main")


# -- quantisation ------------------------------------------------------------------------------


def test_an_unknown_quantisation_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"unknown quantization '2bit': use one of 4bit, 8bit, in"):
        load(tiny_folder, quantization="2bit")
    with pytest.raises(ModelError, match="exclude each other"):
        load(tiny_folder, quantization="8bit", quantization_config={})


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("4bit", "bitsandbytes", "quantization"),
        ("8bit", "bitsandbytes", "quantization"),
        ("int8", "torchao", "int8"),
    ],
)
def test_a_missing_package_is_named_with_the_extra_that_has_it(
    name: str, package: str, extra: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_but_it(wanted: str) -> ModuleSpec | None:
        return None if wanted == package else find_spec(wanted)

    monkeypatch.setattr(quantization, "find_spec", all_but_it)
    install = rf"pip install 'vlm-safeguard\[{extra}\]'"
    with pytest.raises(ModelError, match=f"{name} needs {package}: {install}"):
        load(tiny_folder, quantization=name)
    assert package not in sys.modules
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert {re.split("[><=]", one)[0] for one in extras[extra]} == {package, "accelerate"}


@pytest.mark.parametrize("name", ["4bit", "8bit"])
def test_bitsandbytes_quantises_the_decoder(name: str, tiny_folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    layer = load(tiny_folder, quantization=name, device="cpu").model.model.language_model.layers[0]
    assert layer.mlp.up_proj.weight.dtype == {"4bit": torch.uint8, "8bit": torch.int8}[name]
