"""States are recorded once: what an interrupted calibration recorded is taken by the next."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from tests import checkpoint
from vlm_safeguard.calibration import hidden_states, kept_states
from vlm_safeguard.calibration.hidden_states import record_signs
from vlm_safeguard.calibration.kept_states import Found, once, states_folder
from vlm_safeguard.data.inputs import Query
from vlm_safeguard.errors import CalibrationError, SafeguardError
from vlm_safeguard.model.loading import load
from vlm_safeguard.utils.progress import Progress

ASKED = [Query("How do I bake bread?", None), Query("What is this?", Image.new("RGB", (9, 9)))]
OTHERS = [
    [ASKED[0]],
    ASKED[::-1],
    [Query("How do I bake bread!", None), ASKED[1]],
    [ASKED[0], Query("What is this?", Image.new("RGB", (9, 9), "red"))],
    [ASKED[0], Query("What is this?", Image.new("RGB", (3, 27)))],
]


def test_the_same_requests_are_recorded_once(tmp_path: Path) -> None:
    made: list[torch.Tensor] = []

    def record(_: Path) -> Found:
        made.append(torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(len(made))))
        return made[-1], None if len(made) == 1 else torch.tensor([1, 2])

    states, read = once(tmp_path, ASKED, ("a",), record)
    again, still = once(tmp_path, ASKED, ("a",), record)
    assert len(made) == 1 and read is None and still is None
    assert torch.equal(states, made[0]) and torch.equal(again, made[0])
    for count, (asked, facts) in enumerate([(ASKED, ("b",)), *((o, ("a",)) for o in OTHERS)], 2):
        states, read = once(tmp_path, asked, facts, record)
        assert len(made) == count and torch.equal(states, made[-1])
        assert read is not None and read.tolist() == [1, 2]
    assert len(list(tmp_path.iterdir())) == len(made)


def test_an_interrupted_recording_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(place: Path) -> Found:
        (place / "half").write_bytes(b"x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        once(tmp_path, ASKED, (), interrupted)
    assert list(tmp_path.iterdir()) == []
    states, _ = once(tmp_path, ASKED, (), lambda _: (torch.ones(2, 1, 1), None))
    assert states.tolist() == [[[1.0]], [[1.0]]]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    once(tmp_path, ASKED, (), lambda _: (torch.ones(2, 1, 1), None))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CalibrationError, match=f"{file.name} is damaged: delete it"):
        once(tmp_path, ASKED, (), lambda _: (torch.ones(2, 1, 1), None))


def test_a_full_disk_is_told_and_no_file_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(kept_states, "save_file", full)
    with pytest.raises(CalibrationError, match=r"cannot keep states in .*No space left"):
        once(tmp_path, ASKED, (), lambda _: (torch.ones(2, 1, 1), None))
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, quiet = load(checkpoint.save(tmp_path / "model")), Progress(quiet=True)
    asked = [Query("How do I bake bread?", None), Query("Name a colour.", None)]
    with states_folder(tmp_path / "states", loaded) as folder:
        plain = record_signs(loaded, asked, [], folder, "states", quiet)
        signed = record_signs(loaded, asked, [5, 7], folder, "states", quiet)
        with pytest.raises(SafeguardError, match="another calibration is at work"):
            states_folder(tmp_path / "states", loaded).__enter__()
    assert plain[1] is None and signed[1] is not None
    torch.testing.assert_close(plain[0], signed[0])
    for name in ("record", "record_with_logits"):
        monkeypatch.setattr(hidden_states, name, None)
    with states_folder(tmp_path / "states", loaded) as folder:
        again = record_signs(loaded, asked, [5, 7], folder, "states", quiet)
    assert torch.equal(again[0], signed[0]) and torch.equal(again[1], signed[1])  # type: ignore[arg-type]
    with states_folder(tmp_path / "states", loaded, "medium") as folder:  # otherwise computed
        assert [file.name for file in folder.iterdir()] == ["lock"]
    with torch.no_grad():
        next(loaded.model.parameters()).add_(1)
    with states_folder(tmp_path / "states", loaded) as folder:  # of another model
        assert [file.name for file in folder.iterdir()] == ["lock"]
