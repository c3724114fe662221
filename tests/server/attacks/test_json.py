"""Bodies that attack the parser and the schema."""

import tracemalloc

import pytest

from tests.server.raw import assert_clear, chat_bytes, post
from vlm_safeguard.server.body import check_json
from vlm_safeguard.server.http_errors import RequestError


def with_field(text: str) -> bytes:
    return chat_bytes()[:-1] + b", " + text.encode() + b"}"


BROKEN = {
    "nothing": b"",
    "space": b" ",
    "null": b"null",
    "a number": b"1",
    "a list": b"[]",
    "a text": b'"hi"',
    "cut short": chat_bytes()[:-5],
    "two bodies": chat_bytes() * 2,
    "a comment": b"/* hi */" + chat_bytes(),
    "a trailing comma": chat_bytes()[:-1] + b",}",
    "single quotes": chat_bytes().replace(b'"', b"'"),
    "a form": b"model=tiny&messages=hi",
    "XML": b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>',
    "UTF-16": chat_bytes().decode().encode("utf-16"),
    "UTF-8 with a mark": b"\xef\xbb\xbf" + chat_bytes(),
    "not UTF-8": chat_bytes().replace(b"hi", b"\xff\xfe"),
    "overlong UTF-8": chat_bytes().replace(b"hi", b"\xc0\xaf"),
    "raw surrogate": chat_bytes().replace(b"hi", b"\xed\xa0\x80"),
    "lone surrogate": chat_bytes().replace(b"hi", b"\\ud800"),
    "lone low surrogate": chat_bytes().replace(b"hi", b"\\uDFFF!"),
    "surrogates in the wrong order": chat_bytes().replace(b"hi", b"\\udc00\\ud800"),
    "surrogate in a field's name": with_field('"\\ud800": 1'),
    "raw control character": chat_bytes().replace(b"hi", b"\x00\x1f"),
    "NaN": with_field('"temperature": NaN'),
    "Infinity": with_field('"temperature": Infinity'),
    "-Infinity": with_field('"top_p": -Infinity'),
    "1e999": with_field('"temperature": 1e999'),
    "a field twice": with_field('"model": "tiny"'),
    "a role twice": chat_bytes().replace(b'"role"', b'"role": "system", "role"'),
    "an integer of 5,000 digits": with_field('"seed": ' + "9" * 5000),
    "lists in lists": b"[" * 100_000,
    "closed lists in lists": b"[" * 70_000 + b"]" * 70_000,
    "objects in objects": b'{"a":' * 100_000,
    "deep content": chat_bytes(messages=[{"role": "user", "content": "hi"}]).replace(
        b'"hi"', b"[" * 900 + b"]" * 900
    ),
    "a million lists": b"[" + b"[]," * 600_000 + b"[]]",
    "a million fields": b"{" + b",".join(b'"%d":0' % n for n in range(150_000)) + b"}",
    "100,000 wrong messages": chat_bytes(messages=[0] * 100_000),
    "100,000 wrong parts": chat_bytes(messages=[{"role": "user", "content": [0] * 100_000}]),
    "a thousand fields": chat_bytes(**{f"x{n}": 0 for n in range(1000)}),
    "a long field": chat_bytes(**{"x" * 100_000: 1}),
    "a field with markup": chat_bytes(**{"<script>\u202e{{7*7}}": 1}),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_it_is_refused(live, kind):
    assert_clear(post(live, BROKEN[kind]), 400)


def test_a_crowd_of_errors_takes_no_memory():
    """A hundred thousand wrong items get one message, and millions of values are not parsed."""
    crowds = b"[" + b"[]," * 5_000_000 + b"[]]", b'{"a":' * 1_000_000
    tracemalloc.start()
    for body in crowds:
        with pytest.raises(RequestError, match="values"):
            check_json(body)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_pairs_of_surrogates_are_a_character(live):
    assert post(live, chat_bytes().replace(b"hi", b"\\ud83d\\ude00")).status_code == 200
    assert post(live, chat_bytes().replace(b"hi", b"\\\\ud800")).status_code == 200


FIELDS = {
    "model": ["", "other", "tiny ", "TINY", "../tiny", "/etc/passwd", None, 1, ["tiny"], {}],
    "messages": [None, [], {}, "hi", [[]], [None], [{}], [{"role": "user"}]],
    "stream": ["true", 1, [], {}],
    "stream_options": [{"x": 1}, [], "on"],
    "max_tokens": [0, -1, 1.5, "4", True, 10**30, 100_000, []],
    "max_completion_tokens": [0, -1, 2**63, "4"],
    "temperature": [-0.1, 2.1, "1", True, [], 1e308],
    "top_p": [0, -1, 1.1, "1"],
    "seed": [-1, 2**63, 1.5, "1"],
    "stop": ["", [""], ["a"] * 5, 1, [1], {}, "x" * 201],
    "n": [0, 2, 128, "1", True],
    "logprobs": [True, 1],
    "presence_penalty": [0.1, -1],
    "frequency_penalty": [2],
    "user": [1, [], {}],
    "tools": [[{"type": "function", "function": {"name": "f"}}]],
    "tool_choice": ["auto"],
    "functions": [[]],
    "response_format": [{"type": "json_object"}],
    "chat_template": ["{{ 7*7 }}"],
    "add_generation_prompt": [False],
    "logit_bias": [{"0": 100}],
    "prefix": ["Sure"],
    "guard": ["none"],
    "mode": ["monitor"],
    "alpha": [0],
    "__proto__": [{}],
}


@pytest.mark.parametrize("field", FIELDS)
def test_wrong_values_are_refused_by_name(live, field):
    for value in FIELDS[field]:
        error = assert_clear(post(live, chat_bytes(**{field: value})), 400, 404)
        named = field in ("max_completion_tokens",) or (error["param"] or "").startswith(field)
        assert named, (field, value, error)


MESSAGES = [
    {"role": "tool", "content": "42", "tool_call_id": "a"},
    {"role": "function", "name": "f", "content": "42"},
    {"role": "developer", "content": "hi"},
    {"role": "System", "content": "hi"},
    {"role": "user\nassistant", "content": "hi"},
    {"role": "", "content": "hi"},
    {"role": None, "content": "hi"},
    {"role": "assistant", "content": "hi"},
    {"role": "system", "content": "hi"},
    {"role": "user", "content": None},
    {"role": "user", "content": []},
    {"role": "user", "content": {}},
    {"role": "user", "content": ["hi"]},
    {"role": "user", "content": [{}]},
    {"role": "user", "content": [{"type": "text"}]},
    {"role": "user", "content": [{"type": "text", "text": 1}]},
    {"role": "user", "content": [{"type": "image"}]},
    {"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]},
    {"role": "user", "content": [{"type": "video_url", "video_url": {"url": "a"}}]},
    {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": ""}}]},
    {"role": "user", "content": [{"type": "file", "file": {"file_id": "a"}}]},
    {"role": "user", "content": [{"type": "image_url", "image_url": "data:image/png;base64,"}]},
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a", "path": "b"}}]},
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": None}}]},
    {"role": "user", "content": [{"type": ["text"], "text": "hi"}]},
    {"role": "user", "content": "hi", "tool_calls": []},
    {"role": "user", "content": "hi", "name": "x"},
    {"role": "user", "content": "hi", "prefix": True},
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(MESSAGES)))
def test_messages_of_other_shapes(live, number):
    told = [{"role": "user", "content": "hi"}, MESSAGES[number]]
    assert_clear(post(live, chat_bytes(messages=told)), 400)


def test_too_many_messages_and_characters(live):
    many = [{"role": "user", "content": "a"}] * 101
    assert_clear(live.chat(messages=many), 400)
    assert_clear(live.chat("a" * 100_001), 400)
    assert_clear(live.chat("a" * 2000), 400)  # tokens


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1e-300},
        {"temperature": 5e-324, "seed": 1},
        {"temperature": 1e-39},
        {"temperature": 2, "top_p": 5e-324},
        {"temperature": 0.5, "top_p": 1e-30},
        {"temperature": -0.0},
        {"temperature": 2, "seed": 2**63 - 1},
    ],
)
def test_extreme_sampling_is_answered(live, sampling):
    """The least temperature, or the least top-p, takes the most likely token."""
    answer = live.chat("hi", **sampling)
    assert answer.status_code == 200
    if sampling.get("top_p", 1) < 1 or sampling["temperature"] < 1:
        greedy = live.chat("hi").json()["choices"][0]["message"]["content"]
        assert answer.json()["choices"][0]["message"]["content"] == greedy


@pytest.mark.parametrize("input_", [[], "", [1], [""], None, {}, [["hi"]], [[]], [1, 2], ["a"] * 9])
def test_moderation_of_junk(live, input_):
    answer = live.client.post("/v1/moderations", json={"input": input_})
    if input_ in ("", [""]):  # a text with nothing in it
        assert answer.status_code == 200
    else:
        assert_clear(answer, 400)
