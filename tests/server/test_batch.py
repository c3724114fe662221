"""A file of requests in OpenAI's batch format: nothing is lost, and nothing is answered twice."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.command import run
from tests.server.live import MODEL, Live, open_guard, wait_until
from tests.server.test_clients import MESSAGES, NEW, PICTURE
from vlm_safeguard.errors import DataError, SafeguardError
from vlm_safeguard.model.loading import load
from vlm_safeguard.server import conversation
from vlm_safeguard.server.batch import answer_all
from vlm_safeguard.server.batch_file import URL, Answers, answers, partial_of, read_tasks


def line(name: str, url: str = URL, **body: Any) -> dict[str, Any]:
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": NEW} | body
    return {"custom_id": name, "method": "POST", "url": url, "body": asked}


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_each_answer_is_the_servers_own(live: Live, tmp_path: Path) -> None:
    rows = [line("pictured"), line("text", messages=[{"role": "user", "content": "Hello"}])]
    rows += [line("other", model="gpt"), line("field", tools=[]), line("stream", stream=True)]
    rows += [line("long", messages=[{"role": "user", "content": "word " * 1000}])]
    tasks = read_tasks(written(tmp_path / "in.jsonl", rows), "guard")
    found: list[dict[str, Any]] = []
    answer_all(live.engine, tasks, found.append)
    by_name = {one["custom_id"]: one for one in found}
    assert len(found) == len(by_name) == len(rows)
    assert "leave stream out" in by_name["stream"]["response"]["body"]["error"]["message"]
    for row in rows:
        own = by_name[row["custom_id"]]
        assert own["error"] is None
        if row["custom_id"] == "stream":
            continue
        reply = live.client.post(URL, json=row["body"])
        body = reply.json()
        assert own["response"]["status_code"] == reply.status_code
        for facts in (body, own["response"]["body"]):
            facts.pop("id", None), facts.pop("created", None)
        assert own["response"]["body"] == body


def test_a_failure_is_an_error_and_no_answer(live: Live, tmp_path: Path, monkeypatch: Any) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(live.engine, "_generate", fail)
    found: list[dict[str, Any]] = []
    tasks = read_tasks(written(tmp_path / "in.jsonl", [line("a")]), "guard")
    answer_all(live.engine, tasks, found.append)
    assert found[0]["response"] is None
    assert found[0]["error"]["code"] == "guard_failed"
    assert "secret" not in json.dumps(found)


def test_pictures_are_decoded_while_there_is_room(
    live: Live, tmp_path: Path, monkeypatch: Any
) -> None:
    decode, generate = conversation.decode_image, live.engine._generate
    decoded, ahead = [], []

    def slowly(jobs: Any) -> None:
        if not ahead:
            time.sleep(1.0)
            ahead.append(len(decoded))
        generate(jobs)

    def counted(data: bytes) -> Any:
        decoded.append(decode(data))
        return decoded[-1]

    monkeypatch.setattr(conversation, "decode_image", counted)
    monkeypatch.setattr(live.engine, "_generate", slowly)
    tight = replace(live.engine.settings, max_waiting_pixels=4 * PICTURE.width * PICTURE.height + 1)
    monkeypatch.setattr(live.engine, "settings", tight)
    rows = [line(str(number)) for number in range(10)]  # two pictures each
    found: list[dict[str, Any]] = []
    answer_all(live.engine, read_tasks(written(tmp_path / "in.jsonl", rows), "g"), found.append)
    assert ahead == [2 * 3]
    assert len(decoded) == 2 * len(rows)
    assert [one["response"]["status_code"] for one in found] == [200] * len(rows)


def test_a_body_is_not_larger_than_the_servers(live: Live, tmp_path: Path) -> None:
    large = [line("a", user="x" * live.engine.settings.max_body)]
    found: list[dict[str, Any]] = []
    answer_all(live.engine, read_tasks(written(tmp_path / "in.jsonl", large), "g"), found.append)
    assert found[0]["response"]["status_code"] == 413


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tasks = read_tasks(written(tmp_path / "in.jsonl", [line("a")]), "guard")
    with (
        answers(tmp_path / "out.jsonl", tasks) as kept,
        pytest.raises(SafeguardError, match=r"cannot write .*out\.jsonl"),
    ):
        partial_of(tmp_path / "out.jsonl").mkdir()
        kept.add({"id": tasks[0].id, "custom_id": "a", "response": None})


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([line("a"), line("a")], "line 2: the custom_id 'a' is there twice"),
        ([line("")], "custom_id '' is empty"),
        ([line("\ud800")], "is no valid Unicode"),
        ([line("a", url="/v1/embeddings")], "line 1: url '/v1/embeddings' is not answered"),
        ([line("a") | {"method": "GET"}], "method 'GET' is not answered"),
        ([line("a") | {"body": []}], "the body is not an object"),
        ([line("a") | {"priority": 1}], "'priority' is no field"),
        ([{"custom_id": "a"}], "line 1: no 'method', 'url', 'body'"),
        ([], "is empty"),
    ],
)
def test_a_wrong_file_is_refused(rows: list[Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=reason):
        read_tasks(written(tmp_path / "in.jsonl", rows), "guard")


def test_a_torn_file_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "in.jsonl", [line("a"), line("b")])
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DataError, match="line 2: broken JSON"):
        read_tasks(path, "guard")
    path.write_bytes(json.dumps(line("a")).encode() + '\n{"custom_id": "\u00e9'.encode()[:-1])
    with pytest.raises(DataError, match="line 2: not UTF-8 text"):  # torn within a letter
        read_tasks(path, "guard")


def test_what_was_answered_stays_and_a_torn_answer_is_given_again(tmp_path: Path) -> None:
    tasks = read_tasks(written(tmp_path / "in.jsonl", [line("a"), line("b")]), "guard")
    output = tmp_path / "out.jsonl"

    def answer(place: int) -> dict[str, Any]:
        own = {"id": tasks[place].id, "custom_id": tasks[place].custom_id}
        return own | {"response": {"status_code": 200}, "error": None}

    with answers(output, tasks) as kept:
        kept.add(answer(0))
        with pytest.raises(SafeguardError, match="another run writes"), answers(output, tasks):
            pass
    whole = partial_of(output).read_text()
    partial_of(output).write_text(whole + json.dumps(answer(1))[:30])
    with answers(output, tasks) as kept:
        assert [task.custom_id for task in kept.missing] == ["b"]
        kept.add(answer(1))
        kept.finish()
    assert lines(output) == [answer(0), answer(1)]
    assert not Answers(output, tasks).missing
    more = read_tasks(written(tmp_path / "more.jsonl", [line("a"), line("b"), line("c")]), "guard")
    with pytest.raises(SafeguardError, match="has no answer to 'c': name another file"):
        Answers(output, more)
    other = read_tasks(tmp_path / "in.jsonl", "another guard")
    with pytest.raises(SafeguardError, match="not of this batch, model, guard and mode"):
        Answers(output, other)


def _count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_killed_batch_goes_on(folder: Path, tmp_path: Path) -> None:
    guard, output = tmp_path / "guard", tmp_path / "out.jsonl"
    open_guard(load(folder).model).save_pretrained(guard)
    ask = [{"role": "user", "content": "Hello"}]
    rows = [line(str(n), model=str(folder), messages=ask, max_tokens=40) for n in range(10)]
    written(tmp_path / "in.jsonl", rows)
    command = ["batch", "in.jsonl", str(folder), "-o", "out.jsonl", "--guard", "guard"]
    command += ["--batch", "1", "--max-prompt-tokens", "500"]
    code = "from vlm_safeguard.cli import main; main()"
    first = subprocess.Popen([sys.executable, "-c", code, *command], cwd=tmp_path)
    try:
        assert wait_until(lambda: first.poll() is not None or _count(partial_of(output)) >= 2, 110)
        assert first.poll() is None
    finally:
        first.kill()  # SIGKILL
        first.wait()
    before = partial_of(output).read_text()
    assert not output.exists()
    again = run(*command, "--json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == {"requests": 10, "errors": 0, "output": "out.jsonl"}
    assert output.read_text().startswith(before[: before.rfind("\n") + 1])
    assert sorted(int(one["custom_id"]) for one in lines(output)) == list(range(10))
    assert not partial_of(output).exists()
