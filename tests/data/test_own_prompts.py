"""Calibration data from files of one's own: read, split by question, recorded by digests alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from vlm_safeguard.calibration.conformal import least_bound
from vlm_safeguard.cli.calibrating import own_files
from vlm_safeguard.data.inputs import query
from vlm_safeguard.data.near_copies import clusters
from vlm_safeguard.data.own_prompts import OwnFiles, own_data
from vlm_safeguard.data.prompt_files import PromptRow, read_pairs, read_prompts
from vlm_safeguard.data.prompts import SPLITS, CalibrationData, anchors, calibration
from vlm_safeguard.errors import DataError, SafeguardError

BOUND = least_bound(0.02)


def words(kind: str, count: int) -> list[str]:
    """Questions that share no three words in a row."""
    return [" ".join(f"{kind}{part}{n}" for part in "abcd") for n in range(count)]


def write(path: Path, lines: Sequence[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def files(folder: Path, harmful: int, harmless: int, **more: object) -> OwnFiles:
    return OwnFiles(
        write(folder / "harmful.txt", words("bad", harmful)),
        write(folder / "harmless.txt", words("good", harmless)),
        **more,  # type: ignore[arg-type]
    )


def test_three_kinds_of_files_are_read_alike(tmp_path: Path) -> None:
    rows = [PromptRow("one, two"), PromptRow("three", "a.png", "q1")]
    table = [{"prompt": "one, two"}, {"prompt": "three", "picture": "a.png", "question": "q1"}]
    jsonl = write(tmp_path / "a.jsonl", [json.dumps(row) for row in table])
    csv = write(tmp_path / "a.csv", ["question,prompt,picture", ',"one, two",', "q1,three,a.png"])
    text = write(tmp_path / "a.txt", ["\ufeffone, two", "", "  three "])
    assert read_prompts(jsonl).rows == read_prompts(csv).rows == rows
    assert read_prompts(text).rows == [PromptRow("one, two"), PromptRow("three")]
    assert read_prompts(csv).sha256 == hashlib.sha256(csv.read_bytes()).hexdigest()
    pairs = write(tmp_path / "p.csv", ["harmful,harmless", "rob a bank,open a bank account"])
    assert read_pairs(pairs)[0] == [("rob a bank", "open a bank account")]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "a.jsonl, line 2: there is no 'prompt'"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt"', r"a\.jsonl is not a \.jsonl file, after line 1"),
        ("a.jsonl", b'\n\n{"prompt": "a"}\n{', r"a\.jsonl is not a \.jsonl file, after line 3"),
        ("a.csv", b'prompt\none\n"two" x\n', r"a\.csv is not a \.csv file, after line 2"),
        ("a.jsonl", b"[1]\n", "line 1: there is no 'prompt'"),
        ("a.jsonl", b'{"prompt": 5}\n', "line 1: 'prompt' is not a text"),
        ("a.csv", b"question\nq1\n", "line 2: there is no 'prompt'"),
        ("a.txt", b"\n \n", "is empty"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_files_of_another_form_are_refused(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason):
        read_prompts(tmp_path / name)
    with pytest.raises(DataError, match="cannot read"):
        read_prompts(tmp_path / "missing")
    with pytest.raises(DataError, match=r"should hold pairs: use a \.jsonl or \.csv"):
        read_pairs(tmp_path / "a.txt")


def test_near_copies_have_one_number() -> None:
    texts = ["How do I pick the lock of a shed?", "how do i pick the lock of a garage"]
    texts += ["How do I bake the bread of a monk?", "Bake bread", "bake BREAD!", "x", "y"]
    found = clusters(texts, ["", "", "", "", "", "same", "same"])
    assert [found.index(n) for n in found] == [0, 0, 2, 3, 3, 5, 5]


def test_prompts_alone_are_split_by_question(tmp_path: Path) -> None:
    chosen = files(tmp_path, 60, 40 + BOUND + 20, alone=True)
    lines = chosen.harmful.read_text().splitlines()
    copies = [f"please {line} now" for line in lines]
    write(chosen.harmful, [*lines, *copies])
    data = own_data(chosen, BOUND)
    sets = {split: getattr(data, split) for split in SPLITS}
    asked = {split: {p.cluster for p in found} for split, found in sets.items()}
    assert not (asked["fit"] & asked["held"] or asked["bound"] & (asked["fit"] | asked["held"]))
    assert {s: sum(p.harmful for p in found) for s, found in sets.items()} == {
        "fit": 80,
        "bound": 0,
        "held": 40,
    }
    assert [len(asked[s]) for s in SPLITS] == [40 + 40, BOUND, 20 + 20]
    assert sorted(p.prompt for found in sets.values() for p in found if p.harmful) == sorted(
        [*lines, *copies]
    )
    assert own_data(chosen, BOUND) == data
    assert data.anchors == anchors() and set(data.sha256) == {
        "anchors.jsonl",
        "own-harmful",
        "own-harmless",
    }
    assert not any("bada" in value for value in [*data.sha256, *data.sha256.values()])


def test_prompts_that_are_added_go_where_ours_of_the_same_question_are(tmp_path: Path) -> None:
    ours = CalibrationData.packaged()
    held = next(p for p in calibration("held") if p.harmful and len(p.prompt.split()) > 8)
    bound = next(p for p in calibration("bound") if len(p.prompt.split()) > 8)
    chosen = files(tmp_path, 10, 10)
    write(chosen.harmful, [*words("bad", 10), held.prompt + " today"])
    write(chosen.harmless, [*words("good", 10), bound.prompt + " today"])
    data = own_data(chosen, BOUND)
    for split in SPLITS:
        assert list(getattr(data, split))[: len(getattr(ours, split))] == list(getattr(ours, split))
    added = {p.prompt: p for s in SPLITS for p in getattr(data, s) if p.id.startswith("own-")}
    assert len(added) == 22
    assert added[held.prompt + " today"].split == "held"
    assert added[bound.prompt + " today"].split == "bound"
    assert {p.split for p in added.values() if p.harmful} == {"fit", "held"}
    assert ours.sha256.items() < data.sha256.items()


@pytest.mark.parametrize(
    ("harmful", "harmless", "reason"),
    [
        (59, 300, "harmful.txt has 59 harmful questions .* 60 are needed: 40 to fit .* 20 to test"),
        (60, 200, f"has 200 harmless questions .* {60 + BOUND} .* {BOUND} to set the thresholds"),
    ],
)
def test_too_few_prompts_are_refused_with_what_each_is_for(
    tmp_path: Path, harmful: int, harmless: int, reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        own_data(files(tmp_path, harmful, harmless, alone=True), BOUND)


def test_anchors_of_ones_own(tmp_path: Path) -> None:
    pairs = [{"harmful": f"rob{n}", "harmless": f"rub{n}"} for n in range(64)]
    path = write(tmp_path / "pairs.jsonl", [json.dumps(pair) for pair in pairs])
    added = own_data(files(tmp_path, 9, 9, anchors=path), BOUND)
    assert len(added.anchors) == len(anchors()) + 64 and added.anchors[-1].harmful == "rob63"
    alone = own_data(files(tmp_path, 60, 300, anchors=path, alone=True), BOUND)
    assert len(alone.anchors) == 64 and "anchors.jsonl" not in alone.sha256
    assert alone.sha256["own-anchors"] == hashlib.sha256(path.read_bytes()).hexdigest()
    write(path, [json.dumps(pair) for pair in pairs[:63]])
    with pytest.raises(DataError, match="has 63 pairs, and at least 64 are needed"):
        own_data(files(tmp_path, 60, 300, anchors=path, alone=True), BOUND)


def test_pictures_of_ones_own(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (24, 24), colour).save(folder / name)
    chosen = files(tmp_path, 9, 9, pictures=folder)
    table = tmp_path / "harmful.jsonl"
    write(table, ['{"prompt": "what is this", "picture": "b.png"}', '{"prompt": "plain"}'])
    data = own_data(OwnFiles(table, chosen.harmless, pictures=folder), BOUND)
    mine = [p for s in SPLITS for p in getattr(data, s) if p.id.startswith("own-")]
    about = next(p for p in mine if p.form == "picture")
    seen = query(about, "picture").image
    assert seen is not None and seen.getpixel((0, 0)) == (0, 0, 255)
    others = [query(p, "picture").image for p in mine if p.form == "plain"]
    assert {image.getpixel((0, 0)) for image in others if image} == {(255, 0, 0), (0, 0, 255)}
    digest = data.sha256["own-pictures"]
    Image.new("RGB", (24, 24), "green").save(folder / "a.png")
    assert own_data(chosen, BOUND).sha256["own-pictures"] != digest
    write(table, ['{"prompt": "what is this", "picture": "../b.png"}'])
    for pictures, reason in ((folder, "not in .*pictures"), (None, "no folder is given")):
        with pytest.raises(DataError, match=reason):
            own_data(OwnFiles(table, chosen.harmless, pictures=pictures), BOUND)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="holds no picture"):
        own_data(files(tmp_path, 9, 9, pictures=tmp_path / "none"), BOUND)


def test_a_request_in_both_files_is_refused(tmp_path: Path) -> None:
    chosen = files(tmp_path, 9, 9)
    write(chosen.harmless, [*words("good", 3), words("bad", 3)[2].upper()])
    with pytest.raises(DataError, match=r"prompt 3 of .*harmful.txt is also prompt 4 of"):
        own_data(chosen, BOUND)


def test_options_that_do_not_go_together_are_refused() -> None:
    one, two = Path("a"), Path("b")
    assert own_files(None, None, None, None, False, None) is None
    assert own_files(one, two, None, None, True, None) == OwnFiles(one, two, alone=True)
    for given, reason in (
        ((one, None, None, None, False, None), "--harmless is missing"),
        ((None, None, one, None, False, None), "--harmful is missing"),
        ((one, two, None, None, False, one), "--data is a whole set"),
    ):
        with pytest.raises(SafeguardError, match=reason):
            own_files(*given)
