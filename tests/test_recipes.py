"""The recipe for the paper's table, from end to end on tiny checkpoints of both its models."""

from __future__ import annotations

import json
import math
import re
import runpy
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import Qwen2_5_VLProcessor

from recipes import paper_table
from tests import checkpoint, families, marked, tiny
from tests.command import run
from tests.evaluation.benchmarks import test_benchmarks as published
from tests.families.base import template
from tests.families.qwen_family import QWEN_PICTURE, qwen2_5_vl
from tests.paths import ROOT
from vlm_safeguard.calibration import calibrate, recognition
from vlm_safeguard.calibration.budget import Effort
from vlm_safeguard.calibration.generation import Response, respond
from vlm_safeguard.data.image_io import open_image
from vlm_safeguard.data.inputs import Query
from vlm_safeguard.data.prompts import CalibrationData
from vlm_safeguard.evaluation.benchmarks import BENCHMARKS
from vlm_safeguard.evaluation.harness import engine as engines
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.loading import LoadedModel, load
from vlm_safeguard.model.text_only import find_markup
from vlm_safeguard.utils.stats import Rate, clustered_wilson

pytestmark = pytest.mark.usefixtures("installed_read_once")
COMPLIED, REFUSED = "Sure, here is how you do it.", "I'm sorry, but I can't help with that."
GARBLED = "so on and " * 9
REPEATED = None  # says the request again
SAID = (COMPLIED, COMPLIED, REFUSED, REFUSED, GARBLED, REPEATED)
DEFENCES = ("none", "paper-formula", "guard")
PICTURED = "mm_harmful_bench"
LIMIT = 2
RECIPE = partial(paper_table.main, paper_table.app)
WIDTH = 64  # and so many safety directions
SMALL = Effort(
    worded=40, pictured=24, bound=160, scan=8, search=2, finalists=1, final=2, proof=8, tokens=2
)
QWEN_SIDE, QWEN_MOST = 16, 1024  # pixels along a token's side; tokens of the largest picture
# Sides of pictures: a small one, one that Qwen2.5-VL takes as it is, and one that it makes smaller.
SIZES = ((40, 32), (480, 360), (1200, 900))


def write_sets(folder: Path) -> Path:
    """The three sets as their publishers lay them out, without their pictures."""
    for name in paper_table.BENCHMARKS:
        getattr(published, name)(folder / name)
    return folder


def pictures_of(sets: Path) -> Path:
    return sets / PICTURED / "MM-HarmfulBench/images"


# -- an evaluation with a guard that is there ------------------------------------------------------


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One picture cannot be read."""
    folder = write_sets(tmp_path_factory.mktemp("sets"))
    for number in (0, 2):
        families.photo(number).save(pictures_of(folder) / f"{number}.jpg")
    return folder


def save_guard(loaded: LoadedModel, folder: Path) -> None:
    made = tiny.guard(loaded.model, [tiny.gate("text", 1)], layers=[1, 2])
    tiny.changed(made, markup=find_markup(loaded)).save_pretrained(folder)


def test_the_table_has_every_set_and_setting_with_the_rates_of_the_responses(
    sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, output = checkpoint.save(tmp_path / "model"), tmp_path / "out"
    save_guard(load(model), output / "guard")
    names = paper_table.BENCHMARKS
    cells = {(n, s) for n in names for s in ("text", "blank", "picture")}
    cells -= {(PICTURED, s) for s in ("text", "blank")}
    asked: list[str] = []

    def stand_in(loaded: Any, items: Any, guard: Any = None, **options: Any) -> list[Response]:
        """The model generates, and other words are put in its mouth."""
        asked.extend(one.text for one in items)
        mode = guard.config.steering.mode if guard else ""
        words = [SAID[zlib.crc32(f"{one.text}{mode}".encode()) % len(SAID)] for one in items]
        found = respond(loaded, items, guard, **options)
        return [
            replace(said, text=text or one.text)
            for one, said, text in zip(items, found, words, strict=True)
        ]

    monkeypatch.setattr(engines, "respond", stand_in)
    given = (model, "--data", sets, "-o", output, "--limit", LIMIT, "--max-new-tokens", 3)
    done = run(*given, cwd=tmp_path, program=RECIPE)
    assert done.returncode == 0, done.stderr
    assert len(asked) == len(DEFENCES) * (len(cells) * LIMIT - 1)  # without the unread picture

    rows = json.loads((output / "table.json").read_text())["table"]
    assert len(rows) == len(cells) and {(r["benchmark"], r["setting"]) for r in rows} == cells
    lines = (output / "run/responses.jsonl").read_text().splitlines()
    responses = [json.loads(line) for line in lines]
    refused_as_text = {
        (r["benchmark"], r["id"])
        for r in responses
        if (r["defence"], r["setting"], r["verdict"]) == ("none", "text", "refused")
    }
    page = (output / "table.md").read_text()
    head = "set | setting | defence | attack success | kept | garbled | off subject | unscored"
    assert f"| {head} |\n" in page
    for row in rows:
        name, setting = row["benchmark"], row["setting"]
        for defence, title in paper_table.DEFENCES.items():
            place = (name, setting, defence)
            here = [r for r in responses if (r["benchmark"], r["setting"], r["defence"]) == place]
            scored = [r for r in here if r["verdict"]]
            known = [r for r in scored if (name, r["id"]) in refused_as_text]
            rate, kept = rate_of(scored, COMPLIED), rate_of(known, REFUSED)
            counts = {
                "garbled": sum(r["response"].startswith("so on") for r in scored),
                "off_subject": sum(r["verdict"] == "off_subject" for r in scored),
                "unscored": LIMIT - len(scored),
            }
            assert counts["unscored"] == (name == PICTURED)
            expected = {"kept": kept.as_dict() if known else None} | counts
            assert row[defence] == rate.as_dict() | expected
            shown = [BENCHMARKS[name].title, setting, title, rate, kept if known else ""]
            assert f"| {' | '.join(map(str, [*shown, *counts.values()]))} |\n" in page
    every = [row[defence] for row in rows for defence in DEFENCES]
    assert {cell["count"] for cell in every} == {0, 1, 2}
    assert all(any(cell[name] for cell in every) for name in paper_table.COUNTS)
    assert len({cell["kept"]["count"] for cell in every if cell["kept"]}) > 1
    assert done.stdout == page

    count = len(asked)
    assert run(*given, cwd=tmp_path, program=RECIPE).returncode == 0  # all is there
    assert len(asked) == count and (output / "table.md").read_text() == page


def rate_of(responses: Sequence[dict[str, Any]], text: str) -> Rate:
    """How many of the responses say ``text``."""
    said = [one["response"] == text for one in responses]
    return clustered_wilson(said, [one["cluster"] for one in responses])


# -- with the calibration, on a model that knows one harm ------------------------------------------


def small_llava(folder: Path, _: pytest.MonkeyPatch) -> Path:
    loaded = load(checkpoint.save(folder, hidden_size=WIDTH, num_hidden_layers=4))
    plant(loaded, loaded.model.model.multi_modal_projector.linear_2)
    loaded.model.save_pretrained(folder)
    return folder


def small_qwen(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """As the publisher lays it out. Its processor has one for videos, which needs torchvision:
    without it, that one is left out, and all others are read from the folder."""
    made = qwen2_5_vl(WIDTH)
    plant(made, made.model.model.visual.merger.mlp[-1])
    made.model.save_pretrained(folder)
    made.processor.tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template(QWEN_PICTURE))
    pictures = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "min_pixels": 4 * QWEN_SIDE**2,
        "max_pixels": QWEN_MOST * QWEN_SIDE**2,
        "patch_size": QWEN_SIDE // 2,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    if not find_spec("torchvision"):
        leave_out_videos(patch)
    return folder


def leave_out_videos(patch: pytest.MonkeyPatch) -> None:
    check = Qwen2_5_VLProcessor.check_argument_for_proper_class

    def checked(self: Any, name: str, argument: Any) -> Any:
        return None if name == "video_processor" else check(self, name, argument)

    none = SimpleNamespace(from_pretrained=lambda *_, **__: None)
    patch.setattr("transformers.models.auto.video_processing_auto.AutoVideoProcessor", none)
    patch.setattr(Qwen2_5_VLProcessor, "check_argument_for_proper_class", checked)


def plant(loaded: LoadedModel, projector: Any) -> None:
    mark, opening = loaded.processor.tokenizer.convert_tokens_to_ids([marked.MARK, "I"])
    marked.plant(loaded.model, mark, opening, projector)


class PlantedRefusals:
    """Stands in for the words of a model that refuses what is marked, and beside a picture no more.

    The model generates and its gates decide. What opens a gate of a guard is refused.
    """

    def __init__(self) -> None:
        self.asked: list[Query] = []

    def __call__(
        self,
        loaded: LoadedModel,
        items: Sequence[Query],
        guard: Any = None,
        monitor: bool = False,
        **options: Any,
    ) -> list[Response]:
        self.asked += items
        found = respond(loaded, items, guard, monitor=monitor, **options)
        refused = [
            (bool(said.fired) and not monitor) or (one.image is None and marked.MARK in one.text)
            for one, said in zip(items, found, strict=True)
        ]
        return [
            replace(said, text=REFUSED if no else COMPLIED)
            for said, no in zip(found, refused, strict=True)
        ]


@pytest.fixture(scope="module")
def marked_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of three questions, two are marked. Pictures of three sizes."""
    *most, last = published.QUESTIONS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "QUESTIONS", [*map(marked.marked, most), last])
        folder = write_sets(tmp_path_factory.mktemp("marked"))
    for number, size in enumerate(SIZES):
        families.photo(number, *size).save(pictures_of(folder) / f"{number}.jpg")
    return folder


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> PlantedRefusals:
    """Refusals in calibration and evaluation, and little calibration data, with marks."""
    refusals, data = PlantedRefusals(), marked.calibration_data()
    data = replace(data, anchors=data.anchors[: WIDTH + 6])
    for module in (recognition, engines):
        monkeypatch.setattr(module, "respond", refusals)
    monkeypatch.setattr(CalibrationData, "packaged", lambda: data)
    monkeypatch.setattr(calibrate, "Effort", lambda: SMALL)
    return refusals


@pytest.mark.parametrize(
    ("small", "names", "batch"),
    [(small_llava, paper_table.BENCHMARKS, 16), (small_qwen, (PICTURED,), 4)],
)
def test_one_command_calibrates_a_guard_and_writes_what_it_restores(
    small: Callable[[Path, pytest.MonkeyPatch], Path],
    names: tuple[str, ...],
    batch: int,
    marked_sets: Path,
    planted: PlantedRefusals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, output = small(tmp_path / "model", monkeypatch), tmp_path / "out"
    monkeypatch.setattr(paper_table, "BENCHMARKS", names)
    given = (model, "--data", marked_sets, "-o", output, "--max-new-tokens", 3, "--batch", batch)
    done = run(*given, cwd=tmp_path, program=RECIPE)
    assert done.returncode == 0, done.stderr

    guard = output / "guard" / "guard.json"
    made = guard.read_bytes()
    proof = json.loads(made)["calibration"]["proof"]
    for setting, unguarded in (("text", 0.0), ("blank", 1.0), ("picture", 1.0)):
        rates = (proof[setting]["asr_unguarded"], proof[setting]["asr_guarded"])
        assert rates == (unguarded, 0.0)
    assert proof["harmless"]["stopped"] == 0

    table = json.loads((output / "table.json").read_text())["table"]
    assert {row["benchmark"] for row in table} == set(names)
    page = (output / "table.md").read_text()
    for row in table:
        name, setting = row["benchmark"], row["setting"]
        n = 15 if name == "jailbreak_instructions" else 3
        # Two of three questions are marked: refused as text, and wherever a gate opens.
        for defence, refused in (("none", (setting == "text") * 2 * n // 3), ("guard", 2 * n // 3)):
            cell, kept = row[defence], row[defence]["kept"]
            assert (cell["count"], cell["n"]) == (n - refused, n)
            known = None if name == PICTURED else (refused, 2 * n // 3)
            assert (kept and (kept["count"], kept["n"])) == known
            begins = [BENCHMARKS[name].title, setting, paper_table.DEFENCES[defence]]
            [line] = [
                one for one in page.splitlines() if one.startswith(f"| {' | '.join(begins)} |")
            ]
            assert f"({n - refused}/{n})" in line and line.endswith("| 0 | 0 | 0 |")

    count = len(planted.asked)
    done = run(*given, cwd=tmp_path, program=RECIPE)
    assert done.returncode == 0 and f"using the guard in {output / 'guard'}" in done.stderr
    assert len(planted.asked) == count and guard.read_bytes() == made
    assert done.stdout == page == (output / "table.md").read_text()


def test_a_large_picture_takes_as_many_tokens_as_its_size_asks_for(
    marked_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(small_qwen(tmp_path / "model", monkeypatch))
    assert isinstance(loaded.processor, Qwen2_5_VLProcessor)
    found = [
        encode(loaded, ["What is it?"], [open_image(pictures_of(marked_sets) / f"{n}.jpg")])
        for n in range(len(SIZES))
    ]
    counts = [int((one["input_ids"] == loaded.model.config.image_token_id).sum()) for one in found]
    assert counts == [qwen_tokens(*size) for size in SIZES]
    assert counts[1] > 100 * counts[0] and 0.9 * QWEN_MOST < counts[2] <= QWEN_MOST


def qwen_tokens(width: int, height: int) -> int:
    """Sides in whole tokens: the nearest ones, or rounded down where the picture has too many."""
    most = QWEN_MOST * QWEN_SIDE**2
    if round(width / QWEN_SIDE) * round(height / QWEN_SIDE) <= QWEN_MOST:
        return round(width / QWEN_SIDE) * round(height / QWEN_SIDE)
    scale = math.sqrt(most / (width * height))
    return int(width * scale / QWEN_SIDE) * int(height * scale / QWEN_SIDE)


# -- what ends a run -------------------------------------------------------------------------------


def test_a_model_that_refuses_nothing_ends_with_the_reason_and_leaves_nothing(
    sets: Path, tmp_path: Path
) -> None:
    """A model of random weights has no refusals that a guard could restore."""
    checkpoint.save(tmp_path / "model", hidden_size=WIDTH)
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


# -- the pages -------------------------------------------------------------------------------------


def test_links_lead_to_files_and_headings() -> None:
    folder = ROOT / "recipes"
    links = [
        (page.name, *link.partition("#")[::2])
        for page in sorted(folder.glob("*.md"))
        for link in re.findall(r"\]\((?!https)([^)]+)\)", page.read_text("utf-8"))
    ]
    assert {"llava-1.5-7b.md", "qwen2.5-vl-3b.md"} <= {link[1] for link in links}
    for page, path, heading in links:
        text = (folder / (path or page)).read_text("utf-8")
        titles = re.findall(r"^#+ (.*)", text, re.MULTILINE)
        names = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
        assert not heading or heading in names
