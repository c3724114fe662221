"""A picture without any words: text gates have nothing to read and stay shut."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests import tiny
from vlm_safeguard.guard import Guard
from vlm_safeguard.model import chat
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.text_reader import TextReader
from vlm_safeguard.runtime.attestation import Decision

PHOTO = Image.new("RGB", (24, 24), "red")


def test_what_has_no_words(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def has_words(text: str) -> bool:
        return reader.has_words(chat.encode(loaded, [text], [None])["input_ids"][0].tolist())

    reader = TextReader(loaded.processor)
    assert not has_words("") and not has_words(" \n")
    assert has_words("a") and has_words("\u200b")
    monkeypatch.setattr(loaded.processor, "chat_template", "{{ raise_exception('no') }}")
    assert TextReader(loaded.processor).has_words([])


def talk(*texts: str, system: str = "", picture: bool = True) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [{"type": "image", "image": PHOTO}] if picture else []
    content += [{"type": "text", "text": text} for text in texts]
    turns = [{"role": "system", "content": system}] if system else []
    return [*turns, {"role": "user", "content": content}]


def decided(
    loaded: LoadedModel, made: Guard, talk: list[dict[str, Any]], reads: bool = True
) -> Decision:
    with made.attach(loaded.model, loaded.processor if reads else None) as session:
        inputs = made.prepare(loaded.processor, talk)
        loaded.model.generate(**inputs, max_new_tokens=1)
    return session.decisions[0]


ALWAYS = tiny.gate("text", 2, threshold=-1e9)


@pytest.mark.parametrize("texts", [[""], [], [" \n"]])
def test_a_picture_without_words_leaves_the_text_gate_shut(
    loaded: LoadedModel, texts: list[str]
) -> None:
    made = tiny.guard(loaded.model, [ALWAYS, tiny.gate("vlm", 3, threshold=1e9)])
    shut = decided(loaded, made, talk(*texts))
    assert not shut.fired and torch.tensor(shut.scores["text.0"]).isnan().all()
    made = tiny.guard(loaded.model, [ALWAYS, tiny.gate("vlm", 3, threshold=-1e9)])
    seen = decided(loaded, made, talk(*texts))
    assert (seen.fired, seen.by_text, seen.by_vlm) == (True, False, True)


@pytest.mark.parametrize(
    "words",
    [
        talk("x"),
        talk("\u200b"),
        talk("", picture=False),
        talk("", system="Be kind."),
        [*talk("x"), {"role": "assistant", "content": "y"}, *talk("")],
    ],
)
def test_any_words_are_read(loaded: LoadedModel, words: list[dict[str, Any]]) -> None:
    assert decided(loaded, tiny.guard(loaded.model, [ALWAYS]), words).by_text


def test_without_a_processor_a_picture_without_words_is_read_and_that_is_told(
    loaded: LoadedModel,
) -> None:
    with pytest.warns(UserWarning, match="without the model's processor") as told:
        found = decided(loaded, tiny.guard(loaded.model, [ALWAYS]), talk(""), reads=False)
    assert found.by_text
    assert [Path(one.filename).name for one in told] == ["test_wordless.py"]  # where it attaches


def test_where_warnings_are_errors_nothing_is_attached(loaded: LoadedModel) -> None:
    made = tiny.guard(loaded.model, [ALWAYS])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="without the model's processor"):
            made.attach(loaded.model)
    made.attach(loaded.model, loaded.processor).detach()


@pytest.mark.parametrize("reads", [True, False])
def test_nothing_is_told_where_nothing_is_left_out(loaded: LoadedModel, reads: bool) -> None:
    gate = ALWAYS if reads else tiny.gate("vlm", 3)
    made = tiny.guard(loaded.model, [gate], reference="anchor")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.attach(loaded.model, loaded.processor if reads else None).detach()


def test_words_in_a_picture_are_words(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reader:
        said = ""

        def words(self, picture: Image.Image) -> str:
            return self.said

    monkeypatch.setattr(chat, "reader", Reader)
    made = tiny.changed(tiny.guard(loaded.model, [ALWAYS]), reads_pictures=True)
    assert not decided(loaded, made, talk("")).by_text
    monkeypatch.setattr(Reader, "said", "STOP")
    assert decided(loaded, made, talk("")).by_text


def test_the_rows_of_a_batch_and_their_beams_are_decided_each_by_itself(
    loaded: LoadedModel,
) -> None:
    made = tiny.guard(loaded.model, [ALWAYS])
    inputs = chat.encode(loaded, ["", "x", ""], [PHOTO, PHOTO, None])
    with made.attach(loaded.model, loaded.processor) as session:
        loaded.model.generate(**inputs, max_new_tokens=2, num_beams=2)
    assert [d.fired for d in session.decisions] == [False, True, True]
