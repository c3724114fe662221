"""The demonstration from end to end on a tiny checkpoint: its rates against a count by hand."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests import checkpoint, tiny
from vlm_safeguard.artifact.config import ImageMarkup
from vlm_safeguard.calibration.generation import Response, respond
from vlm_safeguard.data.inputs import queries, settings_of
from vlm_safeguard.data.prompts import Prompt
from vlm_safeguard.evaluation import demonstration
from vlm_safeguard.evaluation.benchmarks import load_benchmark
from vlm_safeguard.evaluation.harness import engine as engines
from vlm_safeguard.guard import Guard
from vlm_safeguard.model import loading
from vlm_safeguard.model.load_options import LoadOptions
from vlm_safeguard.utils.progress import Progress
from vlm_safeguard.utils.stats import clustered_wilson

SAID = {
    "refused": "I'm sorry, but I can't help with that.",
    "complied": "Sure, here is how you do it.",
    "degenerate": "and so on and so on and so on and so on and so on and so on",
    "empty": "",
}
OWN = ("malicious", "jailbreak", "picture")


def verdict(text: str, guarded: bool) -> str:
    """What the stand-in says to a request, known beforehand; more refusals under the guard."""
    kind = zlib.crc32(text.encode()) % 8
    if guarded and kind < 3:
        return "refused"
    return ("complied", "complied", "degenerate", "refused", "refused", "empty")[kind % 6]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One run: its summary, its folder, and what was generated and loaded on the way."""
    folder = checkpoint.save(tmp_path_factory.mktemp("tiny"))
    output = tmp_path_factory.mktemp("report")
    guard, extra = output / "given", output / "extra.txt"
    loaded = loading.load(folder)
    made = tiny.guard(loaded.model, [tiny.gate("text", 2), tiny.gate("vlm", 1, 3)])
    markup = ImageMarkup(
        token_ids=[tiny.IMAGE], after=[made.config.markup.after[0]], pad_id=tiny.PAD
    )
    after = loaded.processor.tokenizer("\n").input_ids
    markup = markup.model_copy(update={"after": type(markup.after)(after)})
    made = Guard(made.config.model_copy(update={"markup": markup}), made.tensors)
    made.save_pretrained(guard)
    extra.write_text("How do I bake bread?\nTell me of the sea.\n")
    asked: list[tuple[str, bool, bool]] = []
    loads: list[Any] = []

    def stand_in(loaded: Any, items: Any, guard: Any = None, **options: Any) -> list[Response]:
        asked.extend((one.text, one.image is not None, guard is not None) for one in items)
        return [
            replace(said, text=SAID[verdict(one.text, guard is not None)])
            for one, said in zip(items, respond(loaded, items, guard, **options), strict=True)
        ]

    def load(*given: Any, **options: Any) -> Any:
        loads.append((*given, LoadOptions(**options)))
        return loading.load(*given, **options)

    size = demonstration.Size(
        per_set=4, vqa=4, tokens=3, perplexity=4, pairs=1, effort=demonstration.QUICK.effort
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demonstration, "assemble", lambda **_: folder)
        patch.setattr(demonstration, "FULL", size)
        patch.setattr(engines, "respond", stand_in)
        patch.setattr(engines, "load", load)
        summary = demonstration.run_demo(output, True, [extra], guard, Progress(quiet=True))
    return summary, output, asked, loads


@pytest.mark.parametrize(
    "capabilities, dtype",
    [
        ({"avx512_bf16": True, "amx_bf16": False}, "bfloat16"),
        ({"architecture": "aarch64", "bf16": True}, "bfloat16"),
        ({"avx512_bf16": False, "avx512_f": True}, "float32"),
        (None, "float32"),  # an older torch
    ],
)
def test_it_computes_in_what_the_processor_is_fast_in(
    capabilities: dict[str, Any] | None,
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if capabilities is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert demonstration.dtype_for(None, Progress()) == dtype
    assert f"computing in {dtype}" in capsys.readouterr().err


def test_a_guard_is_shown_in_its_own_dtype(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demonstration, "multiplies_bfloat16", lambda: True)
    assert demonstration.dtype_for(Guard.from_pretrained("embedded"), Progress()) == "float32"
    assert capsys.readouterr().err == ""


def sets() -> dict[str, list[Prompt]]:
    return {name: load_benchmark(f"own_{name}", limit=4) for name in OWN}


def test_rates_are_those_counted_by_hand(ran: Any) -> None:
    summary = ran[0]
    for name, prompts in sets().items():
        for setting in settings_of(prompts[0]):
            for system in ("unguarded", "guarded", "paper"):
                found = summary["benchmarks"][name][setting][system]
                said = {p.id: verdict(p.prompt, system != "unguarded") for p in prompts}
                harmful = [p for p in prompts if p.harmful]
                harmless = [p for p in prompts if not p.harmful]
                hits = [said[p.id] == "complied" for p in harmful]
                rate = clustered_wilson(hits, [p.cluster for p in harmful])
                assert (found["n"], found["asr_n"], found["over_refusal_n"]) == (8, 4, 4)
                assert found["asr"] == sum(hits) / 4
                assert (found["asr_low"], found["asr_high"]) == (rate.low, rate.high)
                assert found["over_refusal"] == sum(said[p.id] == "refused" for p in harmless) / 4
                assert found["refused"] == sum(said[p.id] == "refused" for p in harmful) / 4
                garbled = sum(said[p.id] in ("degenerate", "empty") for p in prompts)
                assert found["degenerate"] == garbled / 8
    assert set(summary["benchmarks"]) == {*OWN, "extra"}
    # All sets together: two of own requests and the two lines of the file, as text.
    text = summary["settings"]["text"]["unguarded"]
    assert (text["n"], text["asr_n"]) == (18, 10)


def test_gates_are_those_of_the_guard(ran: Any) -> None:
    """How often they open, against the same requests asked here."""
    summary, output, *_ = ran
    guard = Guard.from_pretrained(output / "given")
    [given] = ran[3]
    loaded = engines.engine(*given, demonstration.BATCH).loaded
    prompts = sets()["malicious"]
    fired = respond(loaded, queries(prompts, "blank"), guard, max_new_tokens=3)
    found = summary["benchmarks"]["malicious"]["blank"]["guarded"]
    for name, harmful in (("fired_harmful", True), ("fired_harmless", False)):
        opened = [r.fired for r, p in zip(fired, prompts, strict=True) if p.harmful == harmful]
        assert found[name] == sum(map(bool, opened)) / 4
    assert summary["benchmarks"]["malicious"]["blank"]["unguarded"]["fired_harmful"] is None
    assert set(summary["tradeoff"]) == {"text", "blank", "picture"}


def test_the_model_is_loaded_once_and_asked_once_for_each_response(ran: Any) -> None:
    _, output, asked, loads = ran
    assert len(loads) == 1
    lines = [json.loads(line) for line in (output / "responses.jsonl").read_text().splitlines()]
    keys = [(r["system"], r["setting"], r["benchmark"], r["id"]) for r in lines]
    assert len(keys) == len(set(keys)) == 3 * (8 * 7 + 2 * 3)
    assert len(asked) == len(keys) + 2 * 4  # and the questions of easy-vqa
    for name, prompts in sets().items():
        for prompt in prompts:
            count = Counter(one for one in asked if one[0] == prompt.prompt)
            assert sum(count.values()) == 3 * len(settings_of(prompt)), name


def test_the_report_shows_responses_of_the_same_run(ran: Any) -> None:
    summary, output, *_ = ran
    page = (output / "report.html").read_text()
    assert SAID["complied"] in page and "paper&#39;s formula" in page
    assert json.loads((output / "results.json").read_text()) == summary
    assert {path.name for path in output.iterdir()} == {
        *demonstration.OUTPUTS, "given", "extra.txt",
    }  # fmt: skip
    assert summary["vqa_accuracy"]["n"] == 4
    example = summary["example"]
    assert example["prompt"] in [p.prompt for p in sets()["malicious"] if p.harmful]
    for responses in example["responses"].values():
        for system in ("unguarded", "guarded"):
            said = SAID[verdict(example["prompt"], system == "guarded")]
            assert responses[system].split()[:5] == said.split()[:5]
