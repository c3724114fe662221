"""Runs: planned, stopped, continued, and refused where they do not fit."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from inspect_ai.log import EvalLog

from tests import checkpoint
from tests.evaluation.harness.running import run_plan
from tests.evaluation.harness.test_results_table import HELP
from vlm_safeguard.calibration.generation import Response, respond
from vlm_safeguard.data import prompts
from vlm_safeguard.errors import DataError, Interrupted, SafeguardError
from vlm_safeguard.evaluation.attacks import LOOK
from vlm_safeguard.evaluation.harness import execution as run
from vlm_safeguard.evaluation.harness import results, scorers
from vlm_safeguard.evaluation.harness.engine import made_once
from vlm_safeguard.evaluation.harness.run_identity import prompts_digest
from vlm_safeguard.evaluation.judges.factory import judge_file


def test_all_stands_for_all_beside_other_names() -> None:
    assert run.names([], ("a", "b")) == run.names(["all"], ("a", "b")) == ("a", "b")
    assert run.names(["c", "all", "a"], ("a", "b")) == ("c", "a", "b")


def test_a_stopped_run_goes_on_and_two_runs_do_not_mix(folder: Path, tmp_path: Path) -> None:
    plan = run.Plan(
        (str(folder),), ("none", "self-reminder"), ("own_malicious",), ("text",), limit=2
    )
    first = tmp_path / "run"
    logs = run_plan(plan, first)
    assert len(logs) == 2 and all(log.status == "success" for log in logs)
    files = {p.name: p.stat().st_mtime_ns for p in (first / "logs").glob("*.eval")}
    # As a kill leaves it: one evaluation is missing. Only that one is run again.
    lost = sorted(files)[0]
    (first / "logs" / lost).unlink()
    again = run_plan(plan, first)
    kept = {p.name: p.stat().st_mtime_ns for p in (first / "logs").glob("*.eval")}
    assert len(again) == len(kept) == 2 and lost not in kept
    assert [name for name in kept if kept[name] == files.get(name)] == sorted(files)[1:]
    with pytest.raises(SafeguardError, match="another plan"):
        run_plan(run.Plan((str(folder),), ("none",), ("own_picture",)), first)
    with (
        FileLock(first / run.LOCK),
        pytest.raises(SafeguardError, match="another run is at work"),
    ):
        run_plan(plan, first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmarks": ("own_evil",)}, "unknown benchmark 'own_evil'"),
        ({"defences": ("prayer",)}, "unknown defence 'prayer'"),
        ({"settings": ("video",)}, "unknown setting 'video'"),
        ({"judge": "oracle"}, "unknown judge 'oracle'"),
        ({"benchmarks": ("own_picture",), "settings": ("text",)}, "nothing to run"),
        ({"benchmarks": ("xstest",)}, "name the folder"),
        ({"defences": ("guard",)}, "needs a guard"),
        ({"models": ("nosuch/",)}, "no model folder nosuch/"),
    ],
)
def test_a_bad_plan_is_refused_before_anything_runs(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    facts = {"models": ("m",), "defences": ("none",), "benchmarks": ("own_malicious",)} | changes
    with pytest.raises(SafeguardError, match=message):
        run_plan(run.Plan(**facts), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_is_refused_when_model_or_texts_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text, output = tmp_path / "model", tmp_path / "reminder.txt", tmp_path / "run"
    checkpoint.save(model)
    text.write_text("Be good. [QUESTION]")
    plan = run.Plan(
        (str(model),),
        ("self-reminder",),
        ("own_malicious",),
        ("text",),
        limit=1,
        max_tokens=2,
        defence_texts=(("self-reminder", str(text)),),
    )
    [log] = run_plan(plan, output)
    assert log.eval.model_args["defence_text"] == str(text)
    assert "attack" not in log.eval.model_args
    assert "attack" not in json.loads((output / "plan.json").read_text())
    # A folder of an earlier version, without digests, goes on; they are added.
    facts = json.loads((output / "plan.json").read_text())
    assert facts.pop("sha256")
    (output / "plan.json").write_text(json.dumps(facts))
    run_plan(plan, output)
    with pytest.raises(SafeguardError, match="limit was 1 and is 2"):
        run_plan(replace(plan, limit=2), output)
    text.write_text("Be kind. [QUESTION]")
    with pytest.raises(SafeguardError, match="the text of self-reminder changed"):
        run_plan(plan, output)
    text.write_text("Be good. [QUESTION]")
    checkpoint.save(model, seed=1)
    made_once.cache_clear()  # as another process finds it
    with pytest.raises(SafeguardError, match=r"the weights of .*model changed"):
        run_plan(plan, output)


@pytest.mark.parametrize(
    ("spec", "file"),
    [
        ("phrases", None),
        ("endpoint:http://localhost/v1#model", None),
        ("recorded:said.jsonl", "said.jsonl"),
        ("phrases:no.txt", "no.txt"),
        ("prompt-file:name#ask.txt?batch=2", "ask.txt"),
    ],
)
def test_the_file_that_a_judge_reads_is_part_of_the_run(
    tmp_path: Path, spec: str, file: str | None
) -> None:
    plan = run.Plan(("m",), ("none",), (), judge=spec.replace("said", f"{tmp_path}/said"))
    if file is None:
        assert judge_file(spec) is None and "file of the judge" not in run._digests(plan, [])
        return
    assert judge_file(spec) == Path(file)
    if spec.startswith("recorded"):
        found = []
        for words in ("one", "two"):
            (tmp_path / file).write_text(words)
            found.append(run._digests(plan, [])["file of the judge"])
        assert found[0] != found[1]


def test_what_a_benchmark_says_has_a_digest(tmp_path: Path) -> None:
    given = prompts.evaluation("picture")[:3]
    file = tmp_path / "a.jpg"
    file.write_bytes(b"one")
    given[0] = replace(given[0], picture=(("kind", "file"), ("value", str(file))))
    known = prompts_digest(given)
    moved = file.rename(tmp_path / "b.jpg")
    own = (("kind", "file"), ("value", str(moved)))
    assert prompts_digest([replace(given[0], picture=own), *given[1:]]) == known
    for change in (
        {"id": "x"},
        {"prompt": "x"},
        {"label": "harmless" if given[0].harmful else "harmful"},
        {"picture": given[1].picture},
    ):
        changed = replace(given[0], **({"picture": own} | change))  # type: ignore[arg-type]
        assert prompts_digest([changed, *given[1:]]) != known
    moved.write_bytes(b"two")
    assert prompts_digest([replace(given[0], picture=own), *given[1:]]) != known


def test_an_attack_changes_what_is_asked_and_not_what_is_judged(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    echo = lambda loaded, items, *rest, **more: [  # noqa: E731
        Response(item.text, 5, False, None) for item in items
    ]
    monkeypatch.setattr("vlm_safeguard.evaluation.harness.engine.respond", echo)
    file = tmp_path / "attack.txt"
    file.write_text("Once upon a time: [QUESTION]")
    plan = run.Plan(
        (str(folder),), ("self-reminder",), ("own_jailbreak",), ("text",), limit=2,
        attack=f"template:{file}",
    )  # fmt: skip
    [log] = run_plan(plan, tmp_path / "run")
    assert log.eval.model_args["attack"] == f"template:{file}"
    rows, _ = results.read([log])
    meant = {p.id: p for p in prompts.evaluation("jailbreak")}
    for row in rows:
        assert (row.prompt, row.cluster) == (meant[row.id].prompt, meant[row.id].cluster)
        # The defence goes round the attack.
        assert f"responsible way.\nOnce upon a time: {row.prompt}\nKeep in mind" in row.response
    [log] = run_plan(
        replace(plan, benchmarks=("own_malicious",), attack="typography"),
        tmp_path / "drawn",
    )
    assert all(LOOK in row.response for row in results.read([log])[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attack": "prayer"}, "unknown attack 'prayer'"),
        ({"attack": "typography"}, "use --setting text alone"),
        ({"attack": "typography", "vqa": 3}, "leave out --vqa"),
        ({"defence_texts": (("goal-priority", "a"),)}, "goal-priority, which is not run"),
        ({"defence_texts": (("none", "a"),)}, "none has no wording"),
    ],
)
def test_a_bad_attack_or_text_is_refused_before_anything_runs(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    plan = run.Plan(("m",), ("none",), ("own_malicious",))
    with pytest.raises(DataError, match=message):
        run_plan(replace(plan, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_sample_that_cannot_be_generated_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = run.Plan((str(folder),), ("none",), ("own_malicious",), ("text",), limit=2)
    bad = prompts.evaluation("malicious")[0].prompt

    def failing(loaded: Any, items: Any, *rest: Any, **options: Any) -> Any:
        if any(item.text == bad for item in items):
            raise RuntimeError("out of memory")
        return respond(loaded, items, *rest, **options)

    monkeypatch.setattr("vlm_safeguard.evaluation.harness.engine.respond", failing)
    with pytest.raises(SafeguardError, match=r"1 of 1 .*, sample mal-\S+: .*out of memory"):
        run_plan(plan, tmp_path / "run")
    monkeypatch.setattr("vlm_safeguard.evaluation.harness.engine.respond", respond)
    [log] = run_plan(plan, tmp_path / "run")  # the same command goes on
    assert len(results.read([log])[0]) == 4


def test_an_interrupted_run_is_no_finished_one_and_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = run.Plan((str(folder),), ("none",), ("own_malicious",), ("text",), limit=3, batch=2)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupted(loaded: Any, items: Any, *rest: Any, **options: Any) -> Any:
        """Ctrl-C during the second of three batches."""
        asked.append(len(items))
        if len(asked) == 2:
            time.sleep(1)  # the first batch is logged
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            time.sleep(1)
        return respond(loaded, items, *rest, **options)

    asked: list[int] = []
    monkeypatch.setattr("vlm_safeguard.evaluation.harness.engine.respond", interrupted)
    try:
        with pytest.raises(Interrupted, match=r"1 of 1 .*\(interrupted\).* goes on"):
            run_plan(plan, tmp_path / "run")
    finally:
        signal.signal(signal.SIGINT, before)
    [log] = run_plan(plan, tmp_path / "run")
    assert len(results.read([log])[0]) == 6
    assert asked[:2] == [2, 2] and sum(asked[2:]) < 6  # the third batch was given up at once


class Broken(BaseHTTPRequestHandler):
    """A judge endpoint that gives every second verdict as half a JSON."""

    numbers = itertools.count()  # one step is atomic: requests come from many threads

    def do_POST(self) -> None:
        verdict = '{"verdict": "refused"}' if next(self.numbers) % 2 == 0 else '{"verdict": "ref'
        body = json.dumps({"choices": [{"message": {"content": verdict}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


def test_what_a_broken_judge_leaves_is_unscored_and_counted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    said = lambda loaded, items, *rest, **more: [Response(HELP, 5, False, None) for _ in items]  # noqa: E731
    monkeypatch.setattr("vlm_safeguard.evaluation.harness.engine.respond", said)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # Without a pause between attempts: each sample makes its own at an address that is gone.
    judge = f"endpoint:http://127.0.0.1:{server.server_port}/v1#m?backoff=0"
    plan = run.Plan((str(folder),), ("none",), ("own_malicious",), ("text",), limit=4, judge=judge)
    rows, _ = results.read(run_plan(plan, tmp_path / "run"))
    server.shutdown()
    [entry] = results.table(rows)
    assert (entry["n"], entry["unscored"]) == (8, 4)
    assert entry["asr_n"] + entry["over_refusal_n"] == 4
    assert all("the judge said" in r["reason"] for r in results.unscored(rows))
    server.server_close()  # gone: the run fails with the address, and leaves nothing unsaid
    scorers.shared_judge.cache_clear()
    with pytest.raises(SafeguardError, match=f"{server.server_port}.*cannot be used"):
        run_plan(plan, tmp_path / "second")


def test_a_run_that_is_killed_goes_on_with_every_prompt(folder: Path, tmp_path: Path) -> None:
    plan = {
        "models": (str(folder),),
        "defences": ("none",),
        "benchmarks": ("own_malicious",),
        "settings": ("text", "blank"),
        "limit": 6,
        "max_tokens": 4,
        "batch": 2,
    }
    code = f"""
import time
from pathlib import Path
from vlm_safeguard.evaluation.harness import engine, execution as run

respond = engine.respond

def slowly(*given, **options):
    time.sleep(0.5)  # of 12 batches at most two are done when it is killed
    return respond(*given, **options)

engine.respond = slowly
with run.running(run.Plan(**{plan!r}), Path({str(tmp_path / "run")!r}), "none"):
    pass
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    logs = tmp_path / "run" / "logs"
    deadline = time.monotonic() + 120
    while not list(logs.glob("*.eval")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)  # in the middle of generating
    assert process.poll() is None, "it was done before it could be killed"
    process.kill()
    process.wait()
    rows, _ = results.read(run_plan(run.Plan(**plan), tmp_path / "run"))
    assert [(e["n"], e["unscored"]) for e in results.table(rows)] == [(12, 0), (12, 0)]
    assert len({(r.setting, r.id) for r in rows}) == 24


def test_logs_are_inspects_own(folder: Path, tmp_path: Path) -> None:
    plan = run.Plan((str(folder),), ("none",), ("own_picture",), ("picture",), limit=1)
    [log] = run_plan(plan, tmp_path / "run")
    assert isinstance(log, EvalLog) and log.eval.task == "vlm_safeguard/own_picture"
