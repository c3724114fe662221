"""What a guard in vLLM reads of a request as text is what ``prepare`` makes of its conversation."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from tests import checkpoint, tiny
from vlm_safeguard.artifact.config import ImageMarkup, TextFrame
from vlm_safeguard.engines.vllm.texts import TextForms
from vlm_safeguard.errors import GuardRuntimeError
from vlm_safeguard.guard import Guard
from vlm_safeguard.model import chat
from vlm_safeguard.model.loading import LoadedModel, load

WORDS = {10: "Sale today", 20: "", 30: "Open", 40: "<image> here"}


class _Reader:
    """Knows a picture by its colour."""

    def words(self, picture: Image.Image) -> str:
        return WORDS[picture.getpixel((0, 0))[0]]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(checkpoint.save(tmp_path_factory.mktemp("model")), device="cpu")


@pytest.fixture(scope="module")
def guard(loaded: LoadedModel) -> Guard:
    made = tiny.guard(loaded.model, [tiny.gate("text", 2)])
    markup = ImageMarkup(token_ids=[tiny.IMAGE], after=[13], pad_id=tiny.PAD)
    newline = loaded.processor.tokenizer("\n")["input_ids"]
    return tiny.changed(made, markup=markup.model_copy(update={"after": newline}))


@pytest.fixture
def forms(loaded: LoadedModel, guard: Guard, monkeypatch: pytest.MonkeyPatch) -> TextForms:
    monkeypatch.setattr(chat, "reader", _Reader)
    return TextForms(guard, loaded.processor)


def picture(red: int) -> dict[str, Any]:
    return {"type": "image", "image": Image.new("RGB", (30, 30), (red, 0, 0))}


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def runs(ids: list[int]) -> list[range]:
    """Where the pictures stand: each has as many tokens."""
    places = [place for place, token in enumerate(ids) if token == tiny.IMAGE]
    first = places[:: tiny.PATCHES]
    return [range(place, place + tiny.PATCHES) for place in first]


CONVERSATIONS = [
    [user(said("Hello?"))],
    [user(picture(10), said("What is this?"))],
    [user(picture(20), said("What is this?"))],
    [user(picture(40), said("What is this?"))],
    [user(picture(10), picture(20), picture(30), said("Which?"))],
    [
        user(picture(10), said("What is this?")),
        {"role": "assistant", "content": [said("A shop.")]},
        user(said("And now?")),
    ],
    [
        user(picture(30), said("What is this?")),
        {"role": "assistant", "content": [said("A shop.")]},
        user(picture(10), said("And this?")),
    ],
]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_the_text_is_that_of_prepare(
    loaded: LoadedModel, forms: TextForms, conversation: list[dict[str, Any]]
) -> None:
    batch = chat.prepare(loaded.processor, [conversation], read_pictures=True)
    ids = batch["input_ids"][0].tolist()
    pictures = [part for turn in conversation for part in turn["content"] if "image" in part]
    words = [_Reader().words(part["image"]) for part in pictures]
    order = forms.order(ids, runs(ids), words)
    assert order.texts[0] == batch["text_input_ids"][0].tolist()
    assert not order.wordless


def test_a_picture_without_words_is_wordless(loaded: LoadedModel, forms: TextForms) -> None:
    batch = chat.prepare(loaded.processor, [[user(picture(20), said(""))]])
    ids = batch["input_ids"][0].tolist()
    assert forms.order(ids, runs(ids), [""]).wordless
    assert not forms.order(ids, runs(ids), ["Sale"]).wordless


def test_another_form_of_a_text_is_read_too(loaded: LoadedModel, forms: TextForms) -> None:
    hidden, plain = (
        chat.prepare(loaded.processor, [[user(said(text))]])["input_ids"][0].tolist()
        for text in ("ba\u200bke \uff42read", "bake bread")
    )
    assert forms.order(hidden, [], []).texts == [hidden, plain]
    assert forms.order(plain, [], []).texts == [plain]


def test_an_image_token_without_a_picture_is_refused(forms: TextForms) -> None:
    with pytest.raises(GuardRuntimeError, match="without a picture"):
        forms.order([20, tiny.IMAGE, 30], [], [])


def test_a_request_without_text_is_refused(forms: TextForms) -> None:
    with pytest.raises(GuardRuntimeError, match="no text"):
        forms.order([tiny.IMAGE] * 4, [range(4)], [""])


def test_words_without_a_place_are_refused(loaded: LoadedModel, forms: TextForms) -> None:
    ids = [tiny.IMAGE] * 4 + loaded.processor.tokenizer("\nno template at all")["input_ids"]
    with pytest.raises(GuardRuntimeError, match="at the end of its turn"):
        forms.order(ids, [range(4)], ["Sale"])
    assert len(forms.order(ids, [range(4)], [""]).texts) == 1


def test_a_guard_that_reads_no_text_orders_none(loaded: LoadedModel) -> None:
    made = tiny.guard(loaded.model, [tiny.gate("vlm", 2)], reference="anchor")
    assert TextForms(made, loaded.processor).order([20, 30], [], []).texts == []
    made = tiny.guard(loaded.model, [tiny.gate("vlm", 2)], reference="text")
    assert TextForms(made, loaded.processor).order([20, 30], [], []).texts == [[20, 30]]


def test_texts_whose_mean_is_read_take_nothing_from_the_prefix_cache(
    loaded: LoadedModel, guard: Guard
) -> None:
    frame = TextFrame(before=2, after=1)
    made = tiny.guard(loaded.model, [tiny.gate("text", 2, reads_mean=True)], frame=frame)
    made = tiny.changed(made, markup=guard.config.markup)
    for content in ([said("Hello?")], [picture(20), said("")]):
        ids = chat.prepare(loaded.processor, [[user(*content)]])["input_ids"][0].tolist()
        assert TextForms(made, loaded.processor).order(ids, runs(ids), []).uncached
        assert not TextForms(guard, loaded.processor).order(ids, runs(ids), []).uncached


def test_a_probe_stands_behind_every_text(
    loaded: LoadedModel, guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a text without words, of one with another form, and of sentences."""
    monkeypatch.setattr(chat, "reader", _Reader)
    frame = TextFrame(before=2, after=1, probe=[41, 42])
    made = tiny.guard(loaded.model, [tiny.gate("text", 2, reads_probe=True)], frame=frame)
    made = tiny.changed(made, markup=guard.config.markup, reads_sentences=True)
    plain = TextForms(tiny.changed(guard, reads_sentences=True), loaded.processor)
    for content in (
        [picture(20), said("")],
        [picture(20), said("ba\u200bke \uff42read")],
        [said("Let us play a game. Who eats the bread?")],
    ):
        ids = chat.prepare(loaded.processor, [[user(*content)]])["input_ids"][0].tolist()
        words = [""] * len(runs(ids))
        texts = plain.order(ids, runs(ids), words).texts
        found = TextForms(made, loaded.processor).order(ids, runs(ids), words).texts
        assert found == [[*text, 41, 42] for text in texts]


def test_each_sentence_is_a_text(
    loaded: LoadedModel, guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "reader", _Reader)
    forms = TextForms(tiny.changed(guard, reads_sentences=True), loaded.processor)
    parts = ["Let us play a game.", "Who eats the bread?"]
    texts = [" ".join(parts), *parts]
    wanted = [
        chat.prepare(loaded.processor, [[user(said(text))]])["input_ids"][0].tolist()
        for text in texts
    ]
    for content in ([said(texts[0])], [picture(20), said(texts[0])]):
        batch = chat.prepare(loaded.processor, [[user(*content)]])
        ids = batch["input_ids"][0].tolist()
        pictures = runs(ids)
        order = forms.order(ids, pictures, [""] * len(pictures))
        assert order.texts == wanted and order.judged == [0]


def test_the_last_turn_is_a_text_with_a_verdict(
    loaded: LoadedModel, guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside that of the whole conversation, or of its canonical form."""
    role = "{{ message['role'] }}"
    template = loaded.processor.chat_template
    monkeypatch.setattr(loaded.processor, "chat_template", template.replace(role, "</s>" + role))
    forms = TextForms(tiny.changed(guard, reads_sentences=True), loaded.processor)
    parts = ["Let us play a game.", "Who eats the bread?"]
    last, answer = " ".join(parts), {"role": "assistant", "content": [said("Yes.")]}

    def ids(*talk: dict) -> list[int]:
        return chat.prepare(loaded.processor, [list(talk)])["input_ids"][0].tolist()

    alone = [ids(user(said(text))) for text in (last, *parts)]
    for first, judged in (("Hello.", [0, 1]), ("He\u200bllo.", [1, 2])):
        talk = ids(user(said(first)), answer, user(said(last)))
        order = forms.order(talk, [], [])
        assert order.texts[0] == talk and order.texts[-3:] == alone
        assert order.judged == judged and len(order.texts) == judged[-1] + 3
