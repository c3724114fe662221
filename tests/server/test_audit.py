"""The audit log: what it holds, how it rotates, and what the command tells of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command import run
from tests.server.live import serving
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.server.audit import AuditLog, digest, entries, summarise


def test_entries_survive_rotation_in_order(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "a" / "log", max_bytes=100, keep=50)
    for number in range(20):
        log.write({"number": number})
    assert len(list((tmp_path / "a").iterdir())) > 2
    assert [entry["number"] for entry in entries(log.path)] == list(range(20))


def test_old_files_go(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "log", max_bytes=20, keep=2)
    for number in range(9):
        log.write({"number": number})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "log.1", "log.2"]
    assert [entry["number"] for entry in entries(log.path)] == [6, 7, 8]


def test_bad_logs_are_named(tmp_path: Path) -> None:
    with pytest.raises(SafeguardError, match="no audit log at"):
        list(entries(tmp_path / "none"))
    (tmp_path / "log").write_text('{"a": 1}\nnot json\n')
    with pytest.raises(SafeguardError, match="log:2: not an entry"):
        list(entries(tmp_path / "log"))
    (tmp_path / "file").touch()
    with pytest.raises(SafeguardError, match="cannot write the audit log"):
        AuditLog(tmp_path / "file" / "log")


def test_a_served_request_leaves_digests_and_counts(folder: Path, tmp_path: Path) -> None:
    with serving(folder, tmp_path / "log") as live:
        said = live.chat("secret words").json()["choices"][0]["message"]["content"]
        live.chat("again", stream=True)
        assert live.chat("x", max_tokens=10**6).status_code == 400  # never reaches the model
    first, second = entries(tmp_path / "log")
    assert first["outcome"] == second["outcome"] == "answered"
    assert first["answer_sha256"] == digest(said) and first["answer"] == said
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600
    assert first["scores"]["text.0"][0] > 0
    assert (first["pictures"], first["pictures_reached"], first["words_read"]) == (0, 0, 0)
    assert first["fired"] and first["gates"] == ["text", "vlm"] and first["completion_tokens"] == 4
    found = summarise(entries(tmp_path / "log"))
    assert (found["requests"], found["gate_opened"], found["outcomes"]) == (2, 2, {"answered": 2})
    assert json.loads(run("audit", "log", "--json", cwd=tmp_path).stdout) == found


def test_content_stays_out_unless_it_is_asked_for(folder: Path, tmp_path: Path) -> None:
    with serving(folder, tmp_path / "log", audit_content=False) as live:
        said = live.chat("secret words").json()["choices"][0]["message"]["content"]
    text = (tmp_path / "log").read_text()
    assert "secret" not in text and digest(said) in text
