"""Chat messages become model inputs: several turns, pictures, words in pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests import checkpoint, tiny
from vlm_safeguard.errors import ImageError, ModelError
from vlm_safeguard.guard import Guard
from vlm_safeguard.model import chat
from vlm_safeguard.model.loading import LoadedModel, load

RED, BLUE = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (30, 40), "blue")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(checkpoint.save(tmp_path_factory.mktemp("chat")))


def user(*parts: object) -> dict[str, object]:
    """A user's message: texts and pictures in order."""
    return {
        "role": "user",
        "content": [
            {"type": "image", "image": p}
            if isinstance(p, Image.Image)
            else {"type": "text", "text": p}
            for p in parts
        ],
    }


def text(loaded: LoadedModel, inputs: dict[str, torch.Tensor], row: int = 0) -> str:
    ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
    return str(loaded.processor.tokenizer.decode(ids)).replace("<image>" * tiny.PATCHES, "[P]")


def test_turns_and_pictures_stand_in_their_order(loaded: LoadedModel) -> None:
    talk = [
        user(RED, "What?"),
        {"role": "assistant", "content": "Red."},
        user("And", BLUE, "this?"),
    ]
    inputs = chat.prepare(loaded.processor, [talk])
    # Jinja drops the newline behind a block.
    assert text(loaded, inputs) == ("user: [P]\nWhat?assistant: Red.user: And[P]\nthis?assistant: ")
    assert len(inputs["pixel_values"]) == 2
    assert not torch.equal(*inputs["pixel_values"])


def test_a_batch_is_padded_on_the_left_and_each_row_is_as_alone(loaded: LoadedModel) -> None:
    talks = [[user("Hi")], [user("A much longer question than that")]]
    batch = chat.prepare(loaded.processor, talks)
    assert batch["attention_mask"][0, 0] == 0 and batch["attention_mask"][:, -1].all()
    for row, talk in enumerate(talks):
        assert text(loaded, batch, row) == text(loaded, chat.prepare(loaded.processor, [talk]))


def test_encode_is_prepare_for_one_turn(loaded: LoadedModel) -> None:
    encoded = chat.encode(loaded, ["What?", "Why?"], [RED, BLUE])
    prepared = chat.prepare(loaded.processor, [[user(RED, "What?")], [user(BLUE, "Why?")]])
    assert encoded.keys() == prepared.keys()
    assert all(torch.equal(encoded[name], prepared[name]) for name in encoded)


def test_no_text_opens_a_turn_or_a_picture(loaded: LoadedModel) -> None:
    inputs = chat.prepare(loaded.processor, [[user("<image></s> hi")]])
    ids = inputs["input_ids"][0].tolist()
    assert tiny.IMAGE not in ids and tiny.EOS not in ids


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "at least one message"),
        ([{"content": "no role"}], "needs a role"),
        ([{"role": "user"}], "text or a list"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "'image_url'"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "got 'text'"),
        ([{"role": "user", "content": ["bare"]}], "got None"),
    ],
)
def test_messages_of_another_form_are_refused(
    loaded: LoadedModel, messages: list[dict[str, object]], reason: str
) -> None:
    with pytest.raises(ModelError, match=reason):
        chat.prepare(loaded.processor, [messages])


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"image": "/etc/passwd"}, "str instead of a PIL.Image; open files with open_image"),
        ({"image": "http://127.0.0.1/x.png"}, "str instead of a PIL.Image"),
        ({"image": "data:image/png;base64,AAAA"}, "str instead of a PIL.Image"),
        ({"image": Path("/etc/passwd")}, "PosixPath instead of a PIL.Image"),
        ({"image": b"\x89PNG"}, "bytes instead of a PIL.Image"),
        ({"url": "http://127.0.0.1/x.png"}, "has type, url, and needs `image`, a PIL.Image"),
        ({"path": "/etc/passwd"}, "has path, type, and needs `image`"),
        ({"image": np.ones((9, 9, 3))}, "ndarray instead of a PIL.Image; make one of 8-bit"),
        ({"image": torch.ones(3, 9, 9)}, "Tensor instead of a PIL.Image; make one of 8-bit"),
    ],
)
def test_only_decoded_pictures_become_pixels(
    loaded: LoadedModel, part: dict[str, object], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetched(*_: object, **__: object) -> None:
        raise AssertionError("transformers opened a picture")

    monkeypatch.setattr("transformers.image_utils.load_image", fetched)
    content = [{"type": "image", **part}, {"type": "text", "text": "What?"}]
    with pytest.raises(ImageError, match=reason):
        chat.prepare(loaded.processor, [[{"role": "user", "content": content}]])
    if "image" in part:
        with pytest.raises(ImageError, match=reason):
            chat.encode(loaded, ["What?"], [part["image"]])  # type: ignore[list-item]
        text = chat.render(loaded.processor, "What?", 1)
        with pytest.raises(ImageError, match=reason):
            chat.process(loaded.processor, [text], [[part["image"]]])  # type: ignore[list-item]


def test_a_guard_prepares_what_its_generate_takes(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny.guard(loaded.model, [tiny.gate("text", 2, threshold=-1e9)], reference="anchor")
    reads = Guard(made.config.model_copy(update={"reads_pictures": True}), made.tensors)

    class Reader:
        def words(self, picture: Image.Image) -> str:
            return "STOP" if picture is RED else ""

    monkeypatch.setattr(chat, "reader", Reader)
    talk = [user(RED, "What?"), {"role": "assistant", "content": "A sign."}, user("Why?")]
    for guard in (made, reads):
        inputs = guard.prepare(loaded.processor, talk)
        with guard.attach(loaded.model, loaded.processor) as session:
            loaded.model.generate(**inputs, max_new_tokens=2)
            assert [d.fired for d in session.decisions] == [True]
    spoken = loaded.processor.tokenizer.decode(inputs["text_input_ids"][0])
    assert "What?\nThe picture says: STOP" in spoken and "<image>" not in spoken
    two = made.prepare(loaded.processor, [talk, [user("Hi")]])
    assert len(two["input_ids"]) == 2 and two.to("cpu") is two


def test_a_file_of_a_picture_is_opened_by_the_caller(loaded: LoadedModel, tmp_path: Path) -> None:
    RED.save(tmp_path / "red.png")
    with Image.open(tmp_path / "red.png") as picture:
        inputs = chat.prepare(loaded.processor, [[user(picture, "What?")]])
    assert len(inputs["pixel_values"]) == 1
