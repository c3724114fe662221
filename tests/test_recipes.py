"""The recipe for the paper's table, from end to end on tiny checkpoints of both its models."""

from __future__ import annotations

import json
import runpy
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor

from recipes import paper_table
from tests import checkpoint, families, tiny
from tests.command import run
from tests.evaluation.benchmarks import test_benchmarks as published
from tests.families.qwen_family import qwen2_5_vl
from tests.paths import ROOT
from vlm_safeguard.calibration.generation import Response, respond
from vlm_safeguard.evaluation.benchmarks import BENCHMARKS
from vlm_safeguard.evaluation.harness import engine as engines
from vlm_safeguard.model.loading import LoadedModel, load
from vlm_safeguard.model.text_only import find_markup
from vlm_safeguard.utils.stats import clustered_wilson

pytestmark = pytest.mark.usefixtures("installed_read_once")
COMPLIED = "Sure, here is how you do it."
SAID = (COMPLIED, COMPLIED, "I'm sorry, but I can't help with that.", "so on and " * 9, "")
DEFENCES = ("none", "paper-formula", "guard")
LIMIT = 2
RECIPE = partial(paper_table.main, paper_table.app)


def small_llava(folder: Path, _: pytest.MonkeyPatch) -> None:
    checkpoint.save(folder)


def small_qwen(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Its processor is not read from the folder: that needs torchvision, for videos."""
    made = qwen2_5_vl()
    made.model.save_pretrained(folder)
    patch.setattr(AutoProcessor, "from_pretrained", lambda *_, **__: made.processor)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three sets as their publishers lay them out; one picture cannot be read."""
    folder = tmp_path_factory.mktemp("sets")
    for name in paper_table.BENCHMARKS:
        getattr(published, name)(folder / name)
    pictures = folder / "mm_harmful_bench/MM-HarmfulBench/images"
    for number in (0, 2):
        families.photo(number).save(pictures / f"{number}.jpg")
    return folder


def save_guard(loaded: LoadedModel, folder: Path) -> None:
    made = tiny.guard(loaded.model, [tiny.gate("text", 1)], layers=[1, 2])
    tiny.changed(made, markup=find_markup(loaded)).save_pretrained(folder)


# What is done after a response is the same for both models: one of them has all sets.
@pytest.mark.parametrize(
    ("small", "names"),
    [(small_llava, paper_table.BENCHMARKS), (small_qwen, ("malicious_instruct",))],
)
def test_the_table_has_every_set_and_setting_with_the_rates_of_the_responses(
    small: Callable[[Path, pytest.MonkeyPatch], None],
    names: tuple[str, ...],
    sets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, output = tmp_path / "model", tmp_path / "out"
    small(model, monkeypatch)
    save_guard(load(model), output / "guard")
    monkeypatch.setattr(paper_table, "BENCHMARKS", names)
    pictured = {"mm_harmful_bench"} & set(names)
    cells = {(n, s) for n in names for s in ("text", "blank", "picture")}
    cells -= {(n, s) for n in pictured for s in ("text", "blank")}
    asked: list[str] = []

    def stand_in(loaded: Any, items: Any, guard: Any = None, **options: Any) -> list[Response]:
        """The model generates, and other words are put in its mouth."""
        asked.extend(one.text for one in items)
        mode = guard.config.steering.mode if guard else ""
        return [
            replace(
                said,
                # Where nothing is said, the request is said again.
                text=SAID[zlib.crc32(f"{one.text}{mode}".encode()) % len(SAID)] or one.text,
            )
            for one, said in zip(items, respond(loaded, items, guard, **options), strict=True)
        ]

    monkeypatch.setattr(engines, "respond", stand_in)
    given = (model, "--data", sets, "-o", output, "--limit", LIMIT, "--max-new-tokens", 3)
    done = run(*given, cwd=tmp_path, program=RECIPE)
    assert done.returncode == 0, done.stderr
    # Without the unread picture.
    assert len(asked) == len(DEFENCES) * (len(cells) * LIMIT - len(pictured))

    rows = json.loads((output / "table.json").read_text())["table"]
    assert len(rows) == len(cells) and {(r["benchmark"], r["setting"]) for r in rows} == cells
    lines = (output / "run/responses.jsonl").read_text().splitlines()
    responses = [json.loads(line) for line in lines]
    page = (output / "table.md").read_text()
    for row in rows:
        name, setting = row["benchmark"], row["setting"]
        shown = [BENCHMARKS[name].title, setting]
        for defence in DEFENCES:
            place = (name, setting, defence)
            here = [r for r in responses if (r["benchmark"], r["setting"], r["defence"]) == place]
            scored = [r for r in here if r["verdict"]]
            said = [r["response"] for r in scored]
            rate = clustered_wilson(
                [one == COMPLIED for one in said], [r["cluster"] for r in scored]
            )
            garbled = sum(one.startswith("so on") for one in said)
            repeated = sum(not one.startswith(("so on", "I'm", COMPLIED)) for one in said)
            unscored = LIMIT - len(scored)
            assert unscored == (name == "mm_harmful_bench")
            counts = {"off_subject": repeated, "garbled": garbled, "unscored": unscored}
            assert row[defence] == rate.as_dict() | counts
            notes = [f"{n} {kind.replace('_', ' ')}" for kind, n in counts.items() if n]
            shown.append(", ".join([str(rate), *notes]))
        assert f"| {' | '.join(shown)} |\n" in page
    if len(names) > 1:
        assert any(cell["off_subject"] for row in rows for cell in map(row.get, DEFENCES))
        assert {cell["count"] for row in rows for cell in map(row.get, DEFENCES)} == {0, 1, 2}
    assert done.stdout == page

    count = len(asked)
    assert run(*given, cwd=tmp_path, program=RECIPE).returncode == 0  # all is there
    assert len(asked) == count and (output / "table.md").read_text() == page


def test_a_model_that_refuses_nothing_ends_with_the_reason_and_leaves_nothing(
    sets: Path, tmp_path: Path
) -> None:
    """A model of random weights has no refusals that a guard could restore."""
    checkpoint.save(tmp_path / "model", hidden_size=64)  # as wide as the directions are many
    output = tmp_path / "new" / "out"
    given = (tmp_path / "model", "--data", sets, "-o", output)
    done = run(*given, cwd=tmp_path, program=RECIPE)
    assert done.returncode == 1
    assert "there is nothing that this method could restore" in done.stderr
    assert done.stdout == "" and not output.parent.exists()


def test_the_guard_of_another_model_is_refused(sets: Path, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "model")
    other = load(checkpoint.save(tmp_path / "other", seed=1))
    save_guard(other, tmp_path / "out" / "guard")
    script = partial(runpy.run_path, str(ROOT / "recipes" / "paper_table.py"), run_name="__main__")
    given = (tmp_path / "model", "--data", sets, "-o", "out")
    done = run(*given, cwd=tmp_path, program=script)
    assert done.returncode == 1
    assert "error: this guard is for tiny: the model's weights differ" in done.stderr
    assert not (tmp_path / "out" / "run").exists()
