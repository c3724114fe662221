"""The prompts that ship: counts, forms, digests, and that no group has seen another's prompts."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import easy_vqa
import pytest

from tests.paths import PUBLISHED, ROOT
from training import answers, projector
from training.near import near, published, spoken
from vlm_safeguard.data import prompts
from vlm_safeguard.data.text_forms import TEXT_FORMS


def groups() -> dict[str, list[str]]:
    pairs = prompts.anchors()
    calibration = [p for split in prompts.SPLITS for p in prompts.calibration(split)]
    found = {
        "anchors": [text for pair in pairs for text in (pair.harmful, pair.harmless)],
        "calibration": [spoken(p) for p in calibration if p.form in ("plain", "picture")],
        "malicious": [spoken(p) for p in prompts.evaluation("malicious")],
        "picture": [spoken(p) for p in prompts.evaluation("picture")],
        "jailbreak": [row["prompt"] for row in prompts._rows("eval_jailbreak_questions.jsonl")],
        "templates of calibration": [
            r["prompt"] for r in prompts._rows("calibration_templates.jsonl")
        ],
        "templates of evaluation": [
            r["prompt"] for r in prompts._rows("eval_jailbreak_templates.jsonl")
        ],
    }
    for path in sorted((ROOT / "training" / "data").glob("*.jsonl")):
        found[f"training: {path.stem}"] = [
            json.loads(line)["prompt"] for line in path.read_text("utf-8").splitlines()
        ]
    return found | training_requests()


def training_requests() -> dict[str, list[str]]:
    """The requests of training that code makes: to the language model, and beside pictures."""
    about = [row["prompt"] for row in answers.requests() if row["kind"] == "about"]
    return {
        "training: about a thing": about,
        "training: beside a thing": [asked for asked, _ in answers.INSTRUCTIONS],
        "training: naming": [asked for asked, _ in projector.NAMING],
        "training: easy-VQA": sorted(set(easy_vqa.get_train_questions()[0])),
    }


def test_no_two_groups_share_a_question() -> None:
    found = groups()
    names = list(found)
    for n, left in enumerate(names):
        for right in names[n + 1 :]:
            if left.startswith("training") and right.startswith("training"):
                continue
            assert near(found[left], found[right]) == [], (left, right)


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the public benchmarks are not on this machine")
def test_nothing_of_ours_is_in_the_public_benchmarks() -> None:
    public = published(PUBLISHED)
    for name, texts in groups().items():
        assert near(texts, public) == [], name


def test_near_finds_a_reworded_question() -> None:
    assert near(["How can I pick a stranger's lock?"], ["Tell me how to pick strangers locks"])
    assert not near(["How can I pick a lock?"], ["How can I bake a cake?"])


def test_anchor_pairs_have_the_same_form_and_length() -> None:
    pairs = prompts.anchors()
    assert len(pairs) >= 120
    for pair in pairs:
        assert pair.harmful.startswith("How to ") and pair.harmless.startswith("How to ")
        assert abs(len(pair.harmful.split()) - len(pair.harmless.split())) <= 2


def test_calibration_has_the_promised_breadth() -> None:
    own = [
        p
        for split in prompts.SPLITS
        for p in prompts.calibration(split)
        if p.form in ("plain", "picture")
    ]
    harmful = [p for p in own if p.harmful]
    harmless = [p for p in own if not p.harmful]
    assert len(harmful) >= 200 and len({p.intent for p in harmful}) >= 10
    assert len(harmless) >= 400
    assert sum(p.intent == "lookalike" for p in harmless) >= len(harmless) / 5
    assert len({p.id for p in own}) == len(own)
    assert len({(p.prompt.casefold(), p.picture) for p in own}) == len(own)


def test_some_calibration_prompts_are_several_questions_in_one_message() -> None:
    for split in prompts.SPLITS:
        found = prompts.calibration(split)
        plain = {p.prompt: p for p in found if p.form == "plain"}
        messages = [p for p in found if p.form == "several"]
        labels = {p.label for p in messages}
        assert labels == ({"harmless"} if split == "bound" else {"harmless", "harmful"})
        shared: list[str] = []
        for message in messages:
            asked = [p for text, p in plain.items() if text in message.prompt]
            assert len(asked) >= 2 and {p.label for p in asked} == {message.label}
            assert not any(p.lookalike for p in asked)
            own = [p for p in asked if p.cluster == message.cluster]  # the others lie within these
            assert 2 <= len(own) <= 4
            shared += [p.id for p in own]
        assert len(shared) == len(set(shared))


def test_some_calibration_prompts_are_written_in_each_other_way() -> None:
    found = prompts.calibration("fit")
    plain = {p.id: p for p in found if p.form == "plain"}
    met = set()
    for prompt in (p for p in found if p.form == "written"):
        name, form = prompt.id.split("@")
        assert prompt.prompt == TEXT_FORMS[form](plain[name].prompt)
        assert (prompt.label, prompt.cluster) == (plain[name].label, plain[name].cluster)
        met.add((prompt.label, form))
    assert met == {(label, form) for label in ("harmful", "harmless") for form in TEXT_FORMS}


def test_calibration_parts_share_no_question() -> None:
    clusters = [{p.cluster for p in prompts.calibration(split)} for split in prompts.SPLITS]
    assert len(set().union(*clusters)) == sum(map(len, clusters))


def test_thresholds_are_set_on_enough_harmless_questions() -> None:
    bound = prompts.calibration("bound")
    assert not any(p.harmful for p in bound)
    assert len({p.cluster for p in bound if p.ordinary}) >= 1250  # 1.3% exceed, for 2% at 95%
    assert sum(p.lookalike for p in bound) >= 300


def test_a_prompt_is_harmful_or_ordinary_or_a_lookalike() -> None:
    for split in prompts.SPLITS:
        found = Counter((p.harmful, p.ordinary, p.lookalike) for p in prompts.calibration(split))
        assert set(found) <= {(True, False, False), (False, True, False), (False, False, True)}
        assert found[False, True, False] and found[False, False, True]


@pytest.mark.parametrize("kind", ["malicious", "jailbreak", "picture"])
def test_evaluation_sets_are_balanced(kind: str) -> None:
    items = prompts.evaluation(kind)  # type: ignore[arg-type]
    assert Counter(p.label for p in items) == {"harmful": 100, "harmless": 100}
    assert len({p.id for p in items}) == 200
    if kind == "malicious":
        assert set(Counter(p.intent for p in items if p.harmful).values()) == {10}
        assert sum(p.intent == "lookalike" for p in items) == 25
    if kind == "jailbreak":
        assert len({p.cluster for p in items if p.harmful}) == 20
        assert all(prompts.SLOT not in p.prompt for p in items)
    if kind == "picture":
        assert all(p.picture for p in items)


def test_a_changed_data_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = prompts._bytes
    monkeypatch.setattr(
        prompts, "_bytes", lambda name: real(name) + (b" " if name == "anchors.jsonl" else b"")
    )
    prompts._rows.cache_clear()
    try:
        with pytest.raises(prompts.DataError, match=r"anchors\.jsonl was changed"):
            prompts.anchors()
    finally:
        prompts._rows.cache_clear()


# -- calibration data of one's own ---------------------------------------------------------------


def write(folder: Path, **changes: list[dict[str, object]]) -> Path:
    """A folder of calibration data, with the rows of some files changed."""
    plain = {"form": "plain", "intent": "x"}
    rows = {
        "anchors": [{"id": "a", "harmful": "How to steal?", "harmless": "How to bake?"}],
        "calibration": [
            {"id": f"{split}-{label}", "prompt": f"{label} {split}", "label": label, "split": split}
            | plain
            for split in prompts.SPLITS
            for label in ("harmless", *(["harmful"] if split != "bound" else []))
        ],
        "calibration_templates": [{"id": "t", "prompt": "Say: [QUESTION]"}],
    }
    for name, found in (rows | changes).items():
        text = "".join(json.dumps(row) + "\n" for row in found)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def test_data_of_ones_own_is_read_from_a_folder(tmp_path: Path) -> None:
    data = prompts.CalibrationData.from_folder(write(tmp_path))
    assert [pair.harmful for pair in data.anchors] == ["How to steal?"]
    assert [p.prompt for p in data.bound] == ["harmless bound", "Say: harmless bound"]
    assert {p.label for p in data.fit} == {p.label for p in data.held} == {"harmful", "harmless"}
    digest = hashlib.sha256((tmp_path / "anchors.jsonl").read_bytes()).hexdigest()
    assert data.sha256["anchors.jsonl"] == digest and len(data.sha256) == 3
    (tmp_path / "calibration_templates.jsonl").unlink()
    bare = prompts.CalibrationData.from_folder(tmp_path)
    assert len(bare.fit) == 2 and len(bare.sha256) == 2


def test_the_packages_own_data_is_the_default() -> None:
    data = prompts.CalibrationData.packaged()
    assert list(data.fit) == prompts.calibration("fit")
    names = [
        "anchors.jsonl",
        "calibration.jsonl",
        "calibration_templates.jsonl",
    ]  # none of evaluation
    assert data.sha256 == {name: prompts.digests()[name] for name in names}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"anchors": []}, "no prompts for anchors"),
        ({"calibration": []}, "no prompts for fit"),
        ({"anchors": [{"id": "a", "harmful": "x"}]}, "does not fit: .*harmless"),
        ({"calibration": [{"id": "c"}]}, "does not fit"),
        (
            {
                "calibration": [
                    {"id": "same", "prompt": "x", "label": "harmless", "split": split}
                    | {"form": "plain", "intent": "x"}
                    for split in prompts.SPLITS
                ]
            },
            "same is in fit and in bound",
        ),
    ],
    ids=["no-anchors", "no-prompts", "half-an-anchor", "half-a-prompt", "shared-question"],
)
def test_data_that_cannot_make_a_guard_is_refused(
    tmp_path: Path, changes: dict[str, list[dict[str, object]]], reason: str
) -> None:
    with pytest.raises(prompts.DataError, match=reason):
        prompts.CalibrationData.from_folder(write(tmp_path, **changes))


def test_a_folder_without_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(prompts.DataError, match=r"cannot read calibration data: .*anchors\.jsonl"):
        prompts.CalibrationData.from_folder(tmp_path)
    write(tmp_path)
    (tmp_path / "anchors.jsonl").write_text("no json")
    with pytest.raises(prompts.DataError, match="is not JSONL"):
        prompts.CalibrationData.from_folder(tmp_path)
