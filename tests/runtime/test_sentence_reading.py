"""Text gates of a guard that reads sentences take the highest score of the text and its parts."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from tests import tiny
from tests.runtime.test_text_forms import passes, run, scores
from vlm_safeguard.errors import GuardError
from vlm_safeguard.model.chat import encode, prepare
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.sentences import sentences
from vlm_safeguard.runtime import further_readings

PHOTO = Image.new("RGB", (24, 24), "red")
LONG = "Tell me a story. It is about bread and water. Who eats it in the end?"
SHORT = "How is it made?"


@pytest.mark.parametrize("picture", [None, PHOTO])
def test_the_highest_score_of_all_parts_counts(
    loaded: LoadedModel, picture: Image.Image | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(further_readings, "ROWS", 2)  # several passes
    highest = set()
    for seed in range(6):
        plain = tiny.guard(loaded.model, [tiny.gate("text", 2, 4)], seed)
        made = tiny.changed(plain, reads_sentences=True)
        each = [float(scores(run(loaded, plain, [LONG], picture)).sum())]
        each += [float(scores(run(loaded, plain, [text])).sum()) for text in sentences(LONG)]
        found = run(loaded, made, [SHORT, LONG], picture)
        assert passes(found) == 3  # the texts, and three sentences in twos
        assert float(scores(found)[1].sum()) == pytest.approx(max(each), abs=1e-4)
        alone = scores(run(loaded, plain, [SHORT], picture))[0]
        torch.testing.assert_close(scores(found)[0], alone, atol=1e-4, rtol=1e-4)
        highest.add(each.index(max(each)))
    assert len(highest) > 1


def test_what_is_restored_is_what_the_open_sentence_holds(loaded: LoadedModel) -> None:
    """The threshold lies between the highest sentence and everything else."""
    tried = 0
    for seed in range(6):
        steering = {"reference": "text", "layers": [2, 5]}
        plain = tiny.guard(loaded.model, [tiny.gate("text", 2)], seed, **steering)
        texts = [LONG, *sentences(LONG)]
        each = [float(scores(run(loaded, plain, [text])).sum()) for text in texts]
        best = each.index(max(each))
        if best == 0:
            continue
        tried += 1
        cut = sum(sorted(each)[-2:]) / 2
        plain = tiny.with_thresholds(plain, [[cut]])
        made = tiny.changed(plain, reads_sentences=True)
        ours, theirs = run(loaded, made, [LONG]), run(loaded, plain, [texts[best]])
        assert ours.decisions[0].by_text and theirs.decisions[0].by_text
        assert not run(loaded, plain, [LONG]).decisions[0].fired
        assert ours._reported is not None and theirs._reported is not None
        for layer, expected in theirs._reported.text_coordinates.items():
            got = ours._reported.text_coordinates[layer]
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert tried > 2


def test_without_a_processor_there_are_no_sentences_to_read(loaded: LoadedModel) -> None:
    made = tiny.changed(tiny.guard(loaded.model, [tiny.gate("text", 2)]), reads_sentences=True)
    with pytest.raises(GuardError, match=r"guard.attach\(model, processor\)"):
        made.attach(loaded.model)
    with made.attach(loaded.model, loaded.processor):
        pass


def first_token(loaded: LoadedModel, text: str) -> int:
    """The most probable first token of the answer to a text."""
    with torch.no_grad():
        return int(loaded.model(**encode(loaded, [text], [None])).logits[0, -1].argmax())


def test_where_there_is_a_canonical_form_the_text_has_no_verdict(loaded: LoadedModel) -> None:
    """A model that refuses odd characters would else refuse every harmless request in them."""
    odd, plain = next(
        (odd, one)
        for one in sentences(LONG)
        if first_token(loaded, odd := "\u200b".join(one)) != first_token(loaded, one)
    )
    settings = {"kind": "intent", "openings": [first_token(loaded, odd)], "verdict_weight": 1e4}
    gate = tiny.gate("text", 2).model_copy(update=settings)
    guard = tiny.guard(loaded.model, [gate])
    # In one batch, where the other row's text is its own canonical form.
    found = scores(run(loaded, guard, [odd, plain])).sum(1)
    assert float(found.max()) < 1000
    refused = tiny.changed(guard, gates=[gate.model_copy(update={
        "openings": [first_token(loaded, plain)]
    })])  # fmt: skip
    assert float(scores(run(loaded, refused, [odd, plain])).sum(1).min()) > 1000


@pytest.mark.parametrize("threshold", [-1e9, 1e3])
def test_a_refusal_of_the_canonical_form_counts_where_the_text_opens_the_gate_too(
    loaded: LoadedModel, threshold: float
) -> None:
    odd, plain = "\u200b".join(LONG), LONG
    settings = {"kind": "intent", "openings": [first_token(loaded, plain)], "verdict_weight": 1e4}
    gate = tiny.gate("text", 2, threshold=threshold).model_copy(update=settings)
    guard = tiny.guard(loaded.model, [gate], reference="verdict")
    found = run(loaded, guard, [odd])
    assert found.decisions[0].fired
    assert found._reported is not None and found._reported.refused == [True]


@pytest.mark.parametrize("hidden", [True, False])
def test_a_canonical_form_has_a_verdict_and_a_sentence_has_none(
    loaded: LoadedModel, hidden: bool
) -> None:
    """A verdict that would open every gate, of a text that is read besides the request itself."""
    single = sentences(LONG)
    pairs = [("\u200b".join(one), one) for one in single] if hidden else [(LONG, single[0])]
    asked, opening = next(
        (asked, first_token(loaded, read))
        for asked, read in pairs
        if first_token(loaded, read) != first_token(loaded, asked)
    )
    found = []
    for weight in (0.0, 1e4):
        settings = {"kind": "intent", "openings": [opening], "intent_weight": 0.1}
        gate = tiny.gate("text", 2).model_copy(update=settings | {"verdict_weight": weight})
        made = tiny.changed(tiny.guard(loaded.model, [gate]), reads_sentences=True)
        found.append(float(scores(run(loaded, made, [asked])).sum()))
    assert found[1] > 1000 > abs(found[0]) if hidden else found[1] == found[0]


def test_a_last_turn_has_a_verdict(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the two, that which refuses opens the gate."""
    role = "{{ message['role'] }}"
    template = loaded.processor.chat_template
    monkeypatch.setattr(loaded.processor, "chat_template", template.replace(role, "</s>" + role))
    first, *asked = sentences(LONG)

    def talk(last: str) -> list[dict]:
        turns = ("user", first), ("assistant", SHORT), ("user", last)
        return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]

    def opening(messages: list[dict]) -> int:
        with torch.no_grad():
            logits = loaded.model(**prepare(loaded.processor, [messages])).logits
        return int(logits[0, -1].argmax())

    last = next(one for one in asked if opening(talk(one)) != first_token(loaded, one))
    for token in (first_token(loaded, last), opening(talk(last))):
        settings = {"kind": "intent", "openings": [token], "verdict_weight": 1e4}
        gate = tiny.gate("text", 2).model_copy(update=settings)
        guard = tiny.changed(tiny.guard(loaded.model, [gate]), reads_sentences=True)
        with guard.attach(loaded.model, loaded.processor) as session:
            loaded.model(**guard.prepare(loaded.processor, talk(last)))
        assert sum(session.decisions[0].scores["text.0"]) > 1000


def test_a_sentence_whose_score_needs_no_logits_ends_below_the_head(loaded: LoadedModel) -> None:
    """The verdict is of the whole text: only the intent is read in sentences."""
    counted = []
    head = loaded.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda *_: counted.append(1))
    totals = []
    with hook:
        for intent in (0.0, 0.1):
            settings = {"kind": "intent", "openings": [7], "verdict_weight": 1.0}
            gate = tiny.gate("text", 2).model_copy(update=settings | {"intent_weight": intent})
            made = tiny.changed(tiny.guard(loaded.model, [gate]), reads_sentences=True)
            session = run(loaded, made, [LONG])
            assert passes(session) == 2
            totals.append(len(counted))
            counted.clear()
    assert totals[1] == totals[0] + 1
