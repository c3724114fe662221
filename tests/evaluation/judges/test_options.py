"""How a judge is named: its form and its options."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.evaluation.judges.chat_server import Server, answer, send
from tests.evaluation.judges.responses import PAIRS, WILD
from tests.evaluation.recorded import write_recorded
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.judges import (
    JudgeError,
    make_judge,
)
from vlm_safeguard.evaluation.judges.judge_options import same_judge

# -- options in a spec -------------------------------------------------------------------------


def test_options_stand_in_the_spec(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "abc")
    server.play(send(answer("unsafe\nS1")))
    options = "key_variable=JUDGE_KEY&family=llama-guard&timeout=0.5&retries=0&max_tokens=9"
    judge = make_judge(f"endpoint:{server.url}#org/m?{options}&concurrency=2")
    assert (judge.asks, judge.judge(PAIRS[:1])[0].verdict) == ("harm", "complied")
    assert server.headers[0]["Authorization"] == "Bearer abc"
    assert (server.requests[0]["model"], server.requests[0]["max_tokens"]) == ("org/m", 9)
    assert judge.concurrency == 2  # type: ignore[attr-defined]
    assert "abc" not in judge.name


def test_options_of_local_guard_models(guard_folder: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "wild guard.txt"
    prompt.write_text("{prompt}\n{response}\nAnswer:")
    judge = make_judge(f"qwen3guard:{guard_folder}?asks=refusal&dtype=bfloat16&batch=2")
    assert judge.asks == "refusal"
    assert judge._parts.model.dtype == torch.bfloat16  # type: ignore[attr-defined]
    strict = make_judge(f"qwen3guard:{guard_folder}?controversial=safe")
    assert strict.name == f"{guard_folder}, controversial counted as safe"
    wild = make_judge(f"prompt-file:{guard_folder}#{prompt}?answer=wildguard&asks=refusal")
    read = wild._read  # type: ignore[attr-defined]
    assert (wild.asks, read(WILD.format("no", "yes")).verdict) == ("refusal", "complied")
    assert re.search(r" with wild guard\.txt \([0-9a-f]{8}\), read as wildguard$", wild.name)
    prompt.write_text("{prompt}\n{response}\nHarmful?")  # the same name, another judge
    other = make_judge(f"prompt-file:{guard_folder}#{prompt}?answer=wildguard&asks=refusal")
    assert wild.name != other.name


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("qwen3guard:x?colour=red", "no option 'colour'.*asks, controversial, dtype, device"),
        ("llama-guard:x?asks=harm", "no option 'asks'.*dtype, device, batch"),
        ("endpoint:http://h/v1#m?key=SECRET", "no option 'key'.*key_variable"),
        ("endpoint:http://h/v1#m?SECRET", "written name=value"),
        ("endpoint:http://h/v1#m?", "written name=value"),
        ("endpoint:http://h/v1#m?key_variable=sk-SECRET", "must name an environment variable"),
        ("endpoint:http://h/v1#m?family=other", "family.*llama-guard"),
        ("endpoint:http://h/v1#m?timeout=nan", "timeout.*seconds"),
        ("endpoint:http://h/v1#m?timeout=0", "must be positive"),
        ("endpoint:http://h/v1#m?concurrency=0", "at least 1"),
        ("endpoint:http://h/v1#m?retries=1.5", "whole number"),
        ("endpoint:http://h/v1#m?retries=1&retries=2", "given twice"),
        ("qwen3guard:x?asks=maybe", "refusal, harm"),
        ("qwen3guard:x?device=", "is empty"),
        ("endpoint:http://h/v1?a=b#m", "not an address"),
        ("phrases?asks=harm", "unknown judge"),
    ],
)
def test_options_that_do_not_fit_are_refused(spec: str, message: str) -> None:
    with pytest.raises(JudgeError, match=message) as caught:
        make_judge(spec)
    assert "SECRET" not in str(caught.value)


def test_a_device_that_is_not_there_is_refused(guard_folder: Path) -> None:
    with pytest.raises(JudgeError, match=r"guard model .*the device 'nowhere'"):
        make_judge(f"llama-guard:{guard_folder}?device=nowhere")


def test_a_guard_model_keeps_the_dtype_of_its_checkpoint(
    guard_folder: Path, tmp_path: Path
) -> None:
    """But for float16, which is computed in float32 on a CPU."""
    taken = {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16}
    for saved, dtype in (taken | {torch.float16: torch.float32}).items():
        folder = tmp_path / str(saved)
        AutoModelForCausalLM.from_pretrained(guard_folder, dtype=saved).save_pretrained(folder)
        AutoTokenizer.from_pretrained(guard_folder).save_pretrained(folder)
        judge = make_judge(f"qwen3guard:{folder}?device=cpu")
        assert judge._parts.model.dtype == dtype  # type: ignore[attr-defined]


def test_refusal_phrases_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "phrases.txt"
    file.write_text("# Klingon\nluSpet yIDoq\n", "utf-8")
    pairs = [("q", "LuSpet yIdoq, human."), ("q", "I'm sorry, but I can't help with that.")]
    judge = make_judge(f"phrases:{file}")
    assert [found.verdict for found in judge.judge(pairs)] == ["refused", "complied"]
    verdicts = [found.verdict for found in make_judge("phrases").judge(pairs)]
    assert verdicts == ["complied", "refused"]
    assert judge.name.startswith("phrases:") and str(tmp_path) not in judge.name
    for spec, why in ((f"phrases:{tmp_path}/none", "cannot read"), ("phrases:", "of the form")):
        with pytest.raises(SafeguardError, match=why):
            make_judge(spec)


def test_a_recording_may_have_a_question_mark_in_its_name(tmp_path: Path) -> None:
    path = tmp_path / "what?is=this.jsonl"
    phrases = make_judge("phrases")
    write_recorded(path, phrases, PAIRS, phrases.judge(PAIRS))
    assert make_judge(f"recorded:{path}").judge(PAIRS)[0].verdict == "complied"


def test_how_a_judge_is_asked_does_not_make_it_another() -> None:
    plain = "endpoint:http://h/v1#m"
    assert same_judge(plain, plain + "?timeout=300&key_variable=K&concurrency=1")
    assert not same_judge(plain, plain + "?family=llama-guard")
    assert not same_judge(plain, "endpoint:http://h/v1#n")
    assert not same_judge("recorded:a?b=c", "recorded:a")


# -- specs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gpt", "unknown judge 'gpt'"),
        ("phrases:", "form phrases"),
        ("recorded", "recorded:FILE"),
        ("endpoint:http://host/v1", "endpoint:URL#MODEL"),
        ("prompt-file:name", "prompt-file:NAME#FILE"),
        ("llama-guard:", "llama-guard:NAME"),
    ],
)
def test_bad_specs_name_the_form(spec: str, message: str) -> None:
    with pytest.raises(JudgeError, match=message):
        make_judge(spec)
