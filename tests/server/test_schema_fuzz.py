"""Requests made from the OpenAPI schema, and messages of any shape: no 5xx, and no surprise."""

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.server.raw import assert_clear, post

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
bounded = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


OPERATIONS = [
    ("GET", "/health"), ("GET", "/ready"), ("GET", "/metrics"), ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"), ("POST", "/v1/chat/completions"), ("POST", "/v1/moderations"),
]  # fmt: skip


@pytest.fixture(scope="module")
def schema(shared):
    return schemathesis.openapi.from_url(f"{shared.url}/openapi.json")


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_the_schema(live, schema, method, path):
    @bounded
    @given(case=schema[path][method].as_strategy())
    def ask(case):
        case.call_and_validate(checks=CHECKS)

    ask()


def test_every_operation_is_asked(schema):
    found = {(one.ok().method.upper(), one.ok().path) for one in schema.get_all_operations()}
    assert found == set(OPERATIONS)


# Written as JSON by hand below, so that lone surrogates travel as escapes.
WORDS = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=20),
    st.sampled_from(["<image>", "</s>", "\ud800", "\udfff", "{{ 7*7 }}", "\x00", "\u202e", ""]),
)
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=10,
)
PARTS = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": WORDS | JUNK}),
    st.fixed_dictionaries(
        {"type": st.just("image_url"), "image_url": st.fixed_dictionaries({"url": WORDS}) | JUNK}
    ),
    JUNK,
)
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "developer"]) | JUNK
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": ROLES, "content": WORDS | st.lists(PARTS, max_size=3) | JUNK},
        optional={"name": JUNK, "refusal": JUNK, "tool_calls": JUNK},
    )
    | JUNK,
    max_size=4,
)


@bounded
@given(messages=MESSAGES | JUNK)
def test_messages_of_any_shape(shared, messages):
    body = json.dumps({"model": "tiny", "messages": messages, "max_tokens": 1})
    _answered_or_refused(shared, body)


@bounded
@given(
    fields=st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats() | JUNK,
            "top_p": st.floats() | JUNK,
            "seed": st.integers() | JUNK,
            "stop": WORDS | st.lists(WORDS, max_size=5) | JUNK,
            "max_tokens": st.integers(-1, 3) | JUNK,
            "stream": st.booleans() | JUNK,
            "user": WORDS | JUNK,
        },
    )
)
def test_settings_of_any_value(shared, fields):
    messages = [{"role": "user", "content": "hi"}]
    body = json.dumps({"model": "tiny", "messages": messages, "max_tokens": 1} | fields)
    _answered_or_refused(shared, body)


@bounded
@given(texts=st.lists(WORDS, min_size=1, max_size=3))
def test_any_text_is_answered_under_guard(shared, texts):
    """Whole Unicode is never refused, and half of a character always."""
    told = [{"role": "user", "content": text} for text in texts]
    answer = post(shared, json.dumps({"model": "tiny", "messages": told, "max_tokens": 1}).encode())
    whole = all(_is_whole(text) for text in texts)
    assert answer.status_code == (200 if whole else 400)


def _is_whole(text: str) -> bool:
    try:
        # Two halves that stand side by side are one character in JSON.
        json.loads(json.dumps(text)).encode()
    except UnicodeEncodeError:
        return False
    return True


def _answered_or_refused(live, body: str) -> None:
    answer = post(live, body.encode())
    if answer.status_code == 200:
        assert answer.headers["x-safeguard-status"] == "guarded"
    else:
        assert_clear(answer)
    assert live.witness.unguarded == 0
