"""What ``doctor`` and the docs say of every family."""

from __future__ import annotations

import hashlib

import pytest

from tests import families, family_table
from tests.families import FAMILIES, Family
from tests.model.family_helpers import guard_for
from vlm_safeguard.calibration import doctor
from vlm_safeguard.calibration.doctor import describe, examine
from vlm_safeguard.errors import ModelError
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.fingerprint import template_digest
from vlm_safeguard.model.loading import LoadedModel


def test_description_and_checks(one: Family, loaded: LoadedModel) -> None:
    if not one.text_alone:
        with pytest.raises(ModelError):
            describe(loaded)
        return
    found = describe(loaded)
    assert (found.model, found.family) == (loaded.name, type(loaded.model).__name__)
    assert (found.decoder, found.layers, found.hidden_size) == (one.decoder, 4, 32)
    assert set(found.image_tokens) == set(one.markup[0])
    assert (found.before, found.after) == one.markup[1:]
    assert (found.dtypes, found.devices) == (("float32",), ("cpu",))
    assert found.template == hashlib.sha256(loaded.processor.chat_template.encode()).hexdigest()
    said = {check.name: check.found for check in examine(found)}
    assert f"{one.decoder}: 4 layers of 32" in said["decoder"]
    assert repr(found.image_tokens[0]) in said["image tokens"]


def test_a_guard_for_another_template_is_diagnosed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    one, loaded = FAMILIES["llava"], families.llava()
    made = guard_for(one, loaded)
    identity = {"template_sha256": template_digest(loaded.processor)}
    config = made.config.model_copy(update={"model": made.config.model.model_copy(update=identity)})
    made = Guard(config, made.tensors)
    for name in ("_directions", "_effect"):
        monkeypatch.setattr(doctor, name, lambda *_: [])
    assert all(check.ok for check in doctor.diagnose(loaded, made))
    loaded.processor.chat_template += " "
    failed = [check for check in doctor.diagnose(loaded, made) if not check.ok]
    assert [check.name for check in failed] == ["belongs to this model"]
    assert "chat template differs" in failed[0].found


def test_the_committed_tables_are_current() -> None:
    for path, text in family_table.documents().items():
        assert path.read_text(encoding="utf-8") == text, "python -m tests.family_table"
