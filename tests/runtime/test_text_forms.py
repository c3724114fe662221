"""Text gates read a text and its canonical form, and the worse of the two counts."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests import tiny
from vlm_safeguard.errors import PromptTooLong
from vlm_safeguard.guard import Guard
from vlm_safeguard.model import chat
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.runtime.session import Session

PHOTO = Image.new("RGB", (24, 24), "red")
PLAIN = ["How is it made?", "Tell me a story."]
HIDDEN = ["\u200b".join(PLAIN[0]), PLAIN[1]]
GATES = [tiny.gate("text", 2, 4), tiny.gate("vlm", 3, threshold=1e9)]


def run(
    loaded: LoadedModel,
    made: Guard,
    texts: list[str],
    picture: Image.Image | None = None,
    reads: bool = True,
) -> Session:
    """A guarded request, with the processor known to the session or not."""
    inputs = chat.encode(loaded, texts, [picture] * len(texts), made.config.reads_pictures)
    with made.attach(loaded.model, loaded.processor if reads else None) as session:
        loaded.model.generate(**inputs, max_new_tokens=1, do_sample=False)
    return session


def scores(session: Session, name: str = "text.0") -> Tensor:
    return torch.tensor([decision.parts[name] for decision in session.decisions])


def passes(session: Session) -> int:
    assert session.attestation is not None
    return session.attestation.text_pass.passes


@pytest.mark.parametrize("picture", [None, PHOTO])
def test_ordinary_text_is_read_once_and_as_it_was(
    loaded: LoadedModel, picture: Image.Image | None
) -> None:
    made = tiny.guard(loaded.model, GATES)
    for texts in (PLAIN, ["it is <image> and </s>, broken up", "a\n\n\tb  c"]):
        ours, bare = (run(loaded, made, texts, picture, reads) for reads in (True, False))
        assert torch.equal(scores(ours), scores(bare))
        assert passes(ours) == passes(bare) == 1


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("picture", [None, PHOTO])
def test_hidden_text_is_read_in_both_forms_and_the_worse_one_counts(
    loaded: LoadedModel, picture: Image.Image | None, per_layer: bool
) -> None:
    for seed in (0, 1, 2):
        gates = [tiny.gate("text", 2, 4, per_layer=per_layer)]
        made = tiny.guard(loaded.model, gates, seed)
        raw = scores(run(loaded, made, HIDDEN, picture, reads=False))
        plain = scores(run(loaded, made, PLAIN[:1], picture, reads=False))[0]
        found = run(loaded, made, HIDDEN, picture)
        assert torch.equal(scores(found)[1], raw[1])  # ordinary text beside it
        if per_layer:
            worse = torch.maximum(raw[0], plain)
        else:
            worse = max(raw[0], plain, key=lambda one: float(one.sum()))
        torch.testing.assert_close(scores(found)[0], worse, atol=1e-4, rtol=1e-4)
        assert passes(found) == 2


def between(loaded: LoadedModel) -> list[tuple[Guard, bool]]:
    """Guards with the threshold between the two forms of the hidden text, and whether the plain one
    lies above it."""
    found = []
    for seed in range(4):
        steering = {"reference": "text", "layers": [2, 5]}
        made = tiny.guard(loaded.model, [tiny.gate("text", 2)], seed, **steering)
        raw = float(scores(run(loaded, made, HIDDEN[:1], reads=False)))
        plain = float(scores(run(loaded, made, PLAIN[:1], reads=False)))
        middle = [[(raw + plain) / 2]]
        found.append((tiny.with_thresholds(made, middle), plain > raw))
    assert {plain_above for _, plain_above in found} == {True, False}
    return found


def test_a_gate_opens_on_either_form_and_restores_what_that_form_holds(loaded: LoadedModel) -> None:
    for made, plain_above in between(loaded):
        session = run(loaded, made, HIDDEN[:1])
        assert session.decisions[0].fired and session.decisions[0].by_text
        bare = run(loaded, made, HIDDEN[:1], reads=False)
        assert bare.decisions[0].fired is not plain_above
        opened = run(loaded, made, (PLAIN if plain_above else HIDDEN)[:1], reads=False)
        ours, theirs = session._reported, opened._reported
        assert ours is not None and theirs is not None
        assert set(ours.text_coordinates) == set(theirs.text_coordinates) == {2, 5}
        for layer, expected in theirs.text_coordinates.items():
            torch.testing.assert_close(ours.text_coordinates[layer], expected, atol=1e-4, rtol=1e-4)


def test_a_canonical_form_longer_than_the_positions_is_refused(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = chat.encode(loaded, ["\ufdfa" * 8], [None])  # NFKC makes 18 letters of each
    config, length = loaded.model.config.get_text_config(), inputs["input_ids"].shape[1]
    made = tiny.guard(loaded.model, [tiny.gate("text", 2)])
    with made.attach(loaded.model, loaded.processor) as session:
        loaded.model.generate(**inputs, max_new_tokens=1)
        assert passes(session) == 2
        monkeypatch.setattr(config, "max_position_embeddings", length + 8)
        with pytest.raises(PromptTooLong, match="further reading of the request's text takes"):
            loaded.model.generate(**inputs, max_new_tokens=1)
