"""The modality gap study: its conditions, its encoding of conversations, its numbers, its page."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests import checkpoint, tiny
from vlm_safeguard.calibration.generation import respond
from vlm_safeguard.cli.commands import app
from vlm_safeguard.data import drawings, prompts
from vlm_safeguard.data.inputs import Query, queries
from vlm_safeguard.data.prompts import evaluation
from vlm_safeguard.data.sampling import thin
from vlm_safeguard.errors import DataError, GuardError, SafeguardError
from vlm_safeguard.evaluation.studies.modality_gap import study, write
from vlm_safeguard.evaluation.studies.modality_gap.conditions import (
    CONDITIONS,
    READ,
    landscape,
    seed_of,
    without_pictures,
)
from vlm_safeguard.evaluation.studies.modality_gap.study import inputs_of, observe, obstacle
from vlm_safeguard.evaluation.studies.provenance import made_with
from vlm_safeguard.guard import Guard
from vlm_safeguard.method import gate_scores
from vlm_safeguard.model import loading
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.recording import record
from vlm_safeguard.model.refusals import judge
from vlm_safeguard.model.text_only import find_markup, text_columns, text_only
from vlm_safeguard.utils.stats import mcnemar, wilson

BY_NAME = {condition.name: condition for condition in CONDITIONS}
ITEMS = thin(evaluation("malicious"), 3)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> loading.LoadedModel:
    return loading.load(checkpoint.save(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="module")
def guard(loaded: loading.LoadedModel) -> Any:
    gates = [tiny.gate("text", 2), tiny.gate("vlm", 1, 3)]
    return tiny.changed(tiny.guard(loaded.model, gates), markup=find_markup(loaded))


@pytest.fixture(scope="module")
def found(loaded: loading.LoadedModel, guard: Any) -> dict[str, Any]:
    return study(loaded, per_set=3, guard=guard, max_new_tokens=3)


def talks(name: str) -> list[Any]:
    return [BY_NAME[name].talk(prompt) for prompt in ITEMS]


# -- conditions ------------------------------------------------------------------------------------


def test_a_condition_gives_the_same_conversation_again() -> None:
    for condition in CONDITIONS:
        assert condition.talk(ITEMS[0]) == condition.talk(ITEMS[0])


def test_the_request_is_the_last_turn_unchanged_wherever_it_stands_as_text() -> None:
    for condition in CONDITIONS:
        last = condition.talk(ITEMS[0])[-1]
        assert last.role == "user"
        assert last.text == (READ if condition.needs_reading else ITEMS[0].prompt)


def test_every_condition_has_the_pictures_it_names() -> None:
    counts = {name: [len(turn.images) for turn in talks(name)[0]] for name in BY_NAME}
    assert counts.pop("text") == [0]
    assert (counts.pop("two"), counts.pop("three")) == ([2], [3])
    assert (counts.pop("later"), counts.pop("later-text")) == ([1, 0, 0], [0, 0, 0])
    assert set(map(tuple, counts.values())) == {(1,)}
    assert without_pictures(talks("later")[0]) == talks("later-text")[0]
    drawn = talks("reading")[0][0].images[0]
    assert drawn == drawings.draw_text(ITEMS[0].prompt) == talks("words")[0][0].images[0]


def test_random_pictures_differ_between_prompts() -> None:
    for name in ("noise", "landscape"):
        assert talks(name)[0][0].images != talks(name)[1][0].images


def test_a_landscape_is_smooth_as_natural_pictures_are() -> None:
    """Neighbouring pixels go together, by far more than in noise; sky is not ground."""
    for prompt in ITEMS:
        pixels = np.asarray(landscape(seed_of(prompt)), dtype=float)
        flat = pixels.mean(2)
        assert np.corrcoef(flat[:, 1:].ravel(), flat[:, :-1].ravel())[0, 1] > 0.9
        assert flat[:40].mean() > flat[-40:].mean() and flat.std() > 15
    noise = np.asarray(drawings.noise(1), dtype=float).mean(2)
    assert abs(np.corrcoef(noise[:, 1:].ravel(), noise[:, :-1].ravel())[0, 1]) < 0.1


# -- encoding and running --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "setting"), [("text", "text"), ("blank", "blank"), ("drawing", "picture")]
)
def test_single_turns_are_encoded_and_run_as_everywhere_else(
    loaded: loading.LoadedModel, tmp_path: Path, name: str, setting: Any
) -> None:
    plain = queries(ITEMS, setting)
    expected = encode(loaded, [r.text for r in plain], [r.image for r in plain])
    encoded = inputs_of(loaded, talks(name))
    assert encoded.keys() == expected.keys()
    assert all(torch.equal(encoded[key], value) for key, value in expected.items())
    states, said = observe(loaded, talks(name), max_new_tokens=5, batch=4)
    assert torch.allclose(states, record(loaded, plain, tmp_path, batch=4), atol=1e-3)
    answers = respond(loaded, plain, max_new_tokens=5, batch=4)
    assert said == [answer.text for answer in answers]


@pytest.mark.parametrize("name", ["two", "three", "later"])
def test_other_conversations_read_the_same_in_any_batch(
    loaded: loading.LoadedModel, name: str
) -> None:
    together, _ = observe(loaded, talks(name), max_new_tokens=1, batch=6)
    alone, _ = observe(loaded, talks(name), max_new_tokens=1, batch=1)
    assert torch.allclose(together, alone, atol=1e-3)


def test_a_picture_counts_in_whatever_turn_it_stands(loaded: loading.LoadedModel) -> None:
    names = ("text", "blank", "two", "three", "later", "later-text")
    count = {
        n: int((inputs_of(loaded, talks(n)[:1])["input_ids"] == tiny.IMAGE).sum()) for n in names
    }
    one = count["blank"]
    assert one > 0 and count["later"] == one
    assert (count["two"], count["three"]) == (2 * one, 3 * one)
    assert count["text"] == count["later-text"] == 0


@pytest.mark.parametrize("name", ["two", "later"])
def test_taking_pictures_out_of_the_conversation_or_of_its_tokens_is_one(
    loaded: loading.LoadedModel, name: str
) -> None:
    inputs = inputs_of(loaded, talks(name))
    columns = text_columns(inputs["input_ids"], inputs["attention_mask"], find_markup(loaded))
    ids, mask = text_only(inputs["input_ids"], columns, tiny.PAD)
    expected = inputs_of(loaded, [without_pictures(talk) for talk in talks(name)])
    assert torch.equal(ids, expected["input_ids"])
    assert torch.equal(mask, expected["attention_mask"])


def test_words_cannot_open_a_picture_or_a_turn(loaded: loading.LoadedModel) -> None:
    turn = talks("text")[0][0]
    forged = (type(turn)("user", "see <image> </s>"),)
    ids = inputs_of(loaded, [forged])["input_ids"]
    assert not torch.isin(ids, torch.tensor([tiny.IMAGE, tiny.EOS])).any()


# -- what a model cannot take ----------------------------------------------------------------------

ONE_PICTURE = checkpoint.TEMPLATE.replace(
    "{% for message in messages %}",
    "{% for message in messages %}"
    "{% if message['content'] | selectattr('type', 'equalto', 'image') | list | length > 1 %}"
    "{{ raise_exception('one picture only') }}{% endif %}",
)
FIRST_PICTURE = checkpoint.TEMPLATE.replace(
    "{% if part['type'] == 'image' %}<image>\n{% else %}",
    "{% if part['type'] == 'image' %}{% if loop.first %}<image>\n{% endif %}{% else %}",
)


def test_pictures_that_a_template_refuses_are_reported(
    loaded: loading.LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loaded.processor, "chat_template", ONE_PICTURE)
    found = study(loaded, per_set=1, max_new_tokens=1)
    refused = {n: one["reason"] for n, one in found["conditions"].items() if not one["applicable"]}
    assert refused.keys() == {"two", "three"}
    assert all("one picture only" in reason for reason in refused.values())
    write(found, tmp_path)
    text = (tmp_path / "gap.md").read_text()
    assert "Not applicable, two blanks: " in text and "one picture only" in text
    assert "| two blanks |" not in text and "Gates" not in text


def test_pictures_that_a_template_leaves_out_are_no_condition(
    loaded: loading.LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded.processor, "chat_template", FIRST_PICTURE)
    assert obstacle(loaded, talks("blank"), 1) is None
    assert obstacle(loaded, talks("two"), 1) == "its chat template leaves out a picture"


def test_a_conversation_longer_than_the_models_context_is_no_condition(
    loaded: loading.LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, two = (inputs_of(loaded, talks(n))["input_ids"].shape[1] for n in ("text", "two"))
    config = loaded.model.config.get_text_config()
    monkeypatch.setattr(config, "max_position_embeddings", text + 5)
    assert obstacle(loaded, talks("text"), 5) is None
    assert obstacle(loaded, talks("two"), 5) == (
        f"it takes {two + 5} tokens and the model has room for {text + 5}"
    )


# -- the study -------------------------------------------------------------------------------------


def test_every_condition_is_measured(found: dict[str, Any]) -> None:
    assert list(found["conditions"]) == list(BY_NAME)
    assert (found["n_harmful"], found["n_harmless"]) == (3, 3)
    assert len(found["responses"]) == 6 * len(BY_NAME)
    for one in found["conditions"].values():
        assert one["applicable"] and one["reason"] is None
        assert all(len(values) == tiny.LAYERS for values in one["layers"].values())
    assert found["conditions"]["reading"]["needs_reading"]
    text = found["conditions"]["text"]
    assert text["refused_p"] == text["over_refusal_p"] == 1.0
    assert max(text["layers"]["cosine_shift"]) < 1e-6
    assert max(found["conditions"]["noise"]["layers"]["cosine_shift"]) > 1e-3


def test_states_are_projected_on_the_first_safety_direction(
    loaded: loading.LoadedModel, found: dict[str, Any], tmp_path: Path
) -> None:
    """Written down independently: difference of anchors, its top right singular vector."""
    layer, pairs = 3, prompts.anchors()
    both = [Query(t, None) for t in [p.harmful for p in pairs] + [p.harmless for p in pairs]]
    states = record(loaded, both, tmp_path)[:, layer].numpy()
    differences = states[: len(pairs)] - states[len(pairs) :]
    vector = np.linalg.svd(differences)[2][0]
    vector = vector * np.sign((differences @ vector).mean())
    blank = record(loaded, queries(ITEMS, "blank"), tmp_path)[:, layer].numpy() @ vector
    harmful, harmless = blank[:3], blank[3:]
    measured = found["conditions"]["blank"]["layers"]
    assert measured["mean_harmful"][layer] == pytest.approx(harmful.mean(), abs=1e-3)
    assert measured["mean_harmless"][layer] == pytest.approx(harmless.mean(), abs=1e-3)
    pairs_right = [h > s for h in harmful for s in harmless]
    assert measured["auc"][layer] == pytest.approx(np.mean(pairs_right), abs=1e-5)


def test_refusals_are_counted_apart_and_paired_with_text(
    loaded: loading.LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verdicts by hand: with a picture two of three harmful requests are no longer refused."""

    def fake(_: Any, given: Any, **options: Any) -> tuple[torch.Tensor, list[str]]:
        pictured = any(turn.images for turn in given[0])
        said = ["I'm sorry, I can't help with that."] * 3 + ["Sure, here is how."] * 2 + [""]
        if pictured:
            said[0], said[1] = "Sure, here is how.", ITEMS[1].prompt
            said[3] = ITEMS[3].prompt
        generator = torch.Generator().manual_seed(0)
        return torch.randn(6, tiny.LAYERS, tiny.WIDTH, generator=generator), said

    monkeypatch.setattr(
        sys.modules["vlm_safeguard.evaluation.studies.modality_gap.study"], "observe", fake
    )
    found = study(loaded, per_set=3, max_new_tokens=1)
    text, blank = found["conditions"]["text"], found["conditions"]["blank"]
    assert (text["refused"], text["over_refusal"], text["degenerate"]) == (1.0, 0.0, 1)
    interval = wilson(1, 3)
    assert (blank["refused"], blank["refused_low"]) == (interval.value, interval.low)
    assert blank["refused_p"] == mcnemar([True] * 3, [False, False, True]) == 0.5
    assert blank["over_refusal_p"] == 1.0
    # One harmful request is said again, and a harmless one, which is not counted.
    assert (text["off_subject_harmful"], blank["off_subject_harmful"]) == (0, 1)


def test_gates_read_the_pass_and_the_words(
    loaded: loading.LoadedModel, found: dict[str, Any], guard: Any
) -> None:
    rows = {n: one["gates"] for n, one in found["conditions"].items()}
    # The same words without their pictures: the text gate must say the same.
    assert len({json.dumps(rows[n]["text"]) for n in ("text", "blank", "three", "words")}) == 1
    assert rows["later"]["text"] == rows["later-text"]["text"]
    states, _ = observe(loaded, talks("later"), max_new_tokens=1)
    scores = gate_scores(states[:, [1, 3]], guard.tensors["gate.1"], torch.zeros(2)).sum(1)
    assert rows["later"]["vlm"]["tpr"] == pytest.approx((scores[:3] > 0).double().mean().item())
    assert rows["later"]["vlm"]["fpr"] == pytest.approx((scores[3:] > 0).double().mean().item())


def test_gate_readings_agree_with_the_guard_at_work(
    loaded: loading.LoadedModel, guard: Any, found: dict[str, Any]
) -> None:
    with guard.attach(loaded.model) as session, torch.inference_mode():
        loaded.model(**inputs_of(loaded, talks("later")), use_cache=False)
        by_text = [decision.by_text for decision in session.decisions]
    measured = found["conditions"]["later"]["gates"]["text"]
    assert measured["tpr"] == pytest.approx(sum(by_text[:3]) / 3)
    assert measured["fpr"] == pytest.approx(sum(by_text[3:]) / 3)


def test_a_guard_that_reads_pictures_hears_their_words(
    loaded: loading.LoadedModel, guard: Any, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the request stands in the picture alone, the text gate still tells prompts apart."""
    drawn = {drawings.draw_text(p.prompt).tobytes(): p.prompt for p in ITEMS}

    class Known:
        def words(self, picture: Any) -> str:
            return drawn.get(picture.tobytes(), "")

    monkeypatch.setattr(
        sys.modules["vlm_safeguard.evaluation.studies.modality_gap.study"], "reader", Known
    )
    config = guard.config.model_copy(update={"reads_pictures": True})
    heard = study(loaded, per_set=3, guard=Guard(config, guard.tensors), max_new_tokens=1)
    assert heard["guard_reads_pictures"] and not found["guard_reads_pictures"]
    plain = found["conditions"]["blank"]["gates"]["text"]
    assert heard["conditions"]["blank"]["gates"]["text"] == plain
    one = without_pictures(BY_NAME["reading"].talk(ITEMS[0]), Known().words)
    assert one[0].text == f"{READ}\nThe picture says: {ITEMS[0].prompt}"
    spoken = [without_pictures(t, Known().words) for t in talks("reading")]
    states, _ = observe(loaded, spoken, max_new_tokens=1)
    scores = gate_scores(states[:, [2]], guard.tensors["gate.0"], torch.zeros(1)).sum(1)
    opened = heard["conditions"]["reading"]["gates"]["text"]
    assert opened["tpr"] == pytest.approx((scores[:3] > 0).double().mean().item())
    assert opened["fpr"] == pytest.approx((scores[3:] > 0).double().mean().item())


def test_the_harder_prompts_can_be_studied(loaded: loading.LoadedModel, tmp_path: Path) -> None:
    hard = study(loaded, prompt_set="held", per_set=2, max_new_tokens=1)
    ids = {row["id"] for row in hard["responses"]}
    assert ids <= {p.id for p in prompts.calibration("held") if p.form == "plain"}
    assert list(hard["data_sha256"]) == ["anchors.jsonl", "calibration.jsonl"]
    write(hard, tmp_path)
    assert "held-back calibration prompts" in (tmp_path / "gap.md").read_text("utf-8")


def test_bad_requests_are_refused(loaded: loading.LoadedModel) -> None:
    with pytest.raises(DataError, match="no set of prompts 'hard'"):
        study(loaded, prompt_set="hard", per_set=1)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="per_set is 0"):
        study(loaded, per_set=0)
    with pytest.raises(GuardError, match="this guard is for"):
        study(loaded, per_set=1, guard=tiny.guard(tiny.llava(5), [tiny.gate("text", 2)]))


def test_verdicts_are_the_judges(found: dict[str, Any]) -> None:
    short = [row for row in found["responses"] if len(row["response"].split()) < 10]
    assert short and all(judge(row["response"]) == row["verdict"] for row in short)


# -- files -----------------------------------------------------------------------------------------


def test_four_files_are_written(found: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "new"
    write(found, folder, "study")
    plots = {"study-refusals.png", "study-layers.png"}
    assert {path.name for path in folder.iterdir()} == {"study.md", "assets"}
    assert {path.name for path in (folder / "assets").iterdir()} == {"study.json", *plots}
    assert json.loads((folder / "assets" / "study.json").read_text()) == found
    text = (folder / "study.md").read_text()
    for name in plots:
        assert f"](assets/{name})" in text
        assert (folder / "assets" / name).read_bytes().startswith(b"\x89PNG")
    assert "--per-set 3 --prompts malicious --max-new-tokens 3 --guard GUARD`" in text
    assert found["guard_sha256"][:16] in text and made_with(found["made_with"]) in text
    for condition in CONDITIONS:
        assert text.count(f"**{condition.title}**: ") == 1
    assert "needs reading" in text and "## Gates of the guard" in text
    assert "| Off subject of 3 harmful | Degenerate of 6 |" in text


def test_a_model_that_takes_no_picture_at_all_still_gets_its_page(
    found: dict[str, Any], tmp_path: Path
) -> None:
    conditions = {
        name: one if name == "text" else one | {"applicable": False, "reason": "no room"}
        for name, one in found["conditions"].items()
    }
    write(found | {"conditions": conditions}, tmp_path)
    text = (tmp_path / "gap.md").read_text()
    assert text.count(": no room.") == len(BY_NAME) - 1


def test_nothing_is_written_where_a_part_fails(
    found: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        write(found | {"seconds": float("nan")}, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(SafeguardError, match="cannot write the study to"):
        write(found, tmp_path / "file")


def test_a_study_that_is_interrupted_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pressing Ctrl-C in the second condition."""
    seen: list[str] = []

    def interrupted(*_: Any, what: str, **options: Any) -> Any:
        seen.append(what)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return observe(*_, what=what, **options)

    monkeypatch.setattr(
        sys.modules["vlm_safeguard.evaluation.studies.modality_gap.study"], "observe", interrupted
    )
    folder = checkpoint.save(tmp_path / "model")
    arguments = ["gap", str(folder), "-o", str(tmp_path / "out"), "--per-set", "1", "--quiet"]
    done = CliRunner().invoke(app, [*arguments, "--max-new-tokens", "1"])
    assert done.exit_code == 130 and seen == ["text only", "blank"]
    assert list((tmp_path / "out").iterdir()) == []
    done = CliRunner().invoke(app, [*arguments, "--name", "a/b"])
    assert isinstance(done.exception, SafeguardError) and "set the folder with -o" in str(
        done.exception
    )
