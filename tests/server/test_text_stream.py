"""Tokens become text piece by piece: the same text, cut at the first stop sequence."""

import random

import pytest

from vlm_safeguard.model.loading import load
from vlm_safeguard.server.text_stream import TextStream


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load(folder).processor.tokenizer


def told(tokenizer, ids, stop=()):
    stream, pieces = TextStream(tokenizer, stop), []
    for token in ids:
        pieces.append(stream.add(token))
        if stream.stopped:
            break
    return "".join([*pieces, stream.end()]), stream.stopped


def test_any_tokens_give_the_text_of_all_of_them(tokenizer):
    """Up to a last character of which bytes are missing."""
    chance = random.Random(0)
    for _ in range(300):
        ids = [chance.randrange(260) for _ in range(chance.randrange(1, 50))]
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        assert told(tokenizer, ids)[0].rstrip("\ufffd") == whole.rstrip("\ufffd")


def test_characters_of_several_bytes_come_whole(tokenizer):
    stream = TextStream(tokenizer, ())
    pieces = [stream.add(token) for token in tokenizer.encode("é😀한")]
    assert [piece for piece in pieces if piece] == ["é", "😀", "한"]


def test_nothing_of_a_stop_sequence_is_told(tokenizer):
    chance = random.Random(1)
    for _ in range(500):
        text = "".join(chance.choice("abc") for _ in range(20))
        stop = ["".join(chance.choice("abc") for _ in range(chance.randrange(1, 5)))]
        stop += [chance.choice(["xyz", "ca", "b" * 6])]
        ends = [end for end in range(21) if any(word in text[:end] for word in stop)]
        if ends:
            cut = min(text[: ends[0]].find(w) for w in stop if w in text[: ends[0]])
            expected = text[:cut], True
        else:
            expected = text, False
        assert told(tokenizer, tokenizer.encode(text), stop) == expected


def test_a_character_that_was_cut_shows_as_in_the_whole_text(tokenizer):
    tokens = tokenizer("a✓", add_special_tokens=False).input_ids[:-1]
    stream = TextStream(tokenizer, ())
    pieces = [*map(stream.add, tokens), stream.end()]
    assert "".join(pieces) == tokenizer.decode(tokens) == "a\ufffd"
