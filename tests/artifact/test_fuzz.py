"""Hostile files: nothing but a ``GuardError``, and nothing loads that breaks a rule."""

from __future__ import annotations

import pytest

from tests import fuzz
from vlm_safeguard.artifact import serialization
from vlm_safeguard.artifact.config import GuardConfig
from vlm_safeguard.errors import GuardError
from vlm_safeguard.guard import CONFIG_FILE, TENSOR_FILE, Guard


def test_mutated_guards_are_refused_or_keep_every_rule() -> None:
    summary = fuzz.run(range(3000), seed=1)
    assert summary.crashes == [] and summary.wrong_loads == []
    assert summary.count == summary.refused + summary.loaded == 3000
    # The mutations reach every check but safetensors' own, which stands behind ours.
    assert set(fuzz.CHECKS) - set(summary.refused_by) <= {"safetensors"}
    assert not [name for name in summary.refused_by if name.startswith("other")]
    assert summary.slowest_ms < 5000


def test_a_mutation_is_the_same_in_every_run() -> None:
    for number in range(50):
        assert fuzz.mutation(number, 2, fuzz.seeds()) == fuzz.mutation(number, 2, fuzz.seeds())


def test_files_and_bytes_get_the_same_verdict(tmp_path) -> None:
    sources = fuzz.seeds()
    for number in range(150):
        _, files = fuzz.mutation(number, 3, sources)
        for name, data in zip((CONFIG_FILE, TENSOR_FILE), files, strict=True):
            (tmp_path / name).write_bytes(data)
        assert loads(lambda: Guard.from_pretrained(tmp_path)) == loads(
            lambda files=files: Guard.from_bytes(*files)
        ), number


def loads(load) -> bool:
    try:
        return isinstance(load(), Guard)
    except GuardError:
        return False


# -- the rules notice a loader that is too kind ----------------------------------------------------


def weaken(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    if what == "values":
        monkeypatch.setattr(serialization, "check_tensors", lambda tensors, config: None)
    elif what == "header":
        monkeypatch.setattr(serialization, "_check_header", lambda blob, config: None)
    elif what == "types":
        validate = GuardConfig.model_validate
        monkeypatch.setattr(GuardConfig, "model_validate", lambda raw, strict: validate(raw))
    elif what == "json":
        monkeypatch.setattr(
            serialization, "_strict_json", lambda data, *_: serialization.json.loads(data)
        )
    elif what == "extent":
        monkeypatch.setattr(serialization, "_check_extent", lambda value, name: None)


@pytest.mark.parametrize("what", ["values", "header", "types", "json", "extent"])
def test_a_weakened_loader_is_noticed(monkeypatch, what) -> None:
    weaken(monkeypatch, what)
    found = (fuzz.run(range(n, n + 50), seed=1) for n in range(0, 3000, 50))
    assert any(summary.crashes or summary.wrong_loads for summary in found)
