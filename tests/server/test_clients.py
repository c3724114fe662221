"""The clients that people use, unchanged, against a live server."""

from __future__ import annotations

import asyncio
import base64
import io
from typing import Any

import pytest
from PIL import Image

from tests.server.live import MODEL, Live

openai = pytest.importorskip("openai")
PICTURE = Image.new("RGB", (32, 32), (10, 120, 90))
NEW = 5


def data_uri(picture: Image.Image) -> str:
    """A picture as a data URI."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


MESSAGES: list[Any] = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Good day."},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "What is this?"},
            {"type": "image_url", "image_url": {"url": data_uri(PICTURE)}},
            {"type": "image_url", "image_url": {"url": data_uri(PICTURE), "detail": "low"}},
        ],
    },
]


@pytest.fixture
def answer(live: Live) -> str:
    """What the server answers to ``MESSAGES``."""
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": NEW}
    reply = live.client.post("/v1/chat/completions", json=body).json()
    return str(reply["choices"][0]["message"]["content"])


def test_openai(live: Live, answer: str) -> None:
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
    ask = client.chat.completions.create
    whole = ask(model=MODEL, messages=MESSAGES, max_tokens=NEW)
    assert whole.choices[0].message.content == answer
    assert whole.usage.completion_tokens == NEW and whole.choices[0].finish_reason == "length"
    assert whole.model_extra["safeguard"]["pictures"]["reached_model"] == 2
    chunks = list(
        ask(
            model=MODEL,
            messages=MESSAGES,
            max_tokens=NEW,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == answer
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert chunks[-2].choices[0].finish_reason == "length"
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "vlm-safeguard"
    assert client.moderations.create(model=MODEL, input="hello").results[0].flagged


def test_openai_errors_are_its_own_types(live: Live) -> None:
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
    ask = client.chat.completions.create
    with pytest.raises(openai.BadRequestError, match="logprobs"):
        ask(model=MODEL, messages=MESSAGES, logprobs=True)
    with pytest.raises(openai.NotFoundError, match="one model: tiny"):
        ask(model="other", messages=MESSAGES)
    remote = [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]
    with pytest.raises(openai.BadRequestError, match="data URIs only"):
        ask(model=MODEL, messages=[{"role": "user", "content": remote}])


def test_openai_async_requests_share_batches_and_get_their_own_answers(live: Live) -> None:
    async def ask_all() -> list[str]:
        client = openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
        replies = await asyncio.gather(*(ask(client, number) for number in range(6)))
        await client.close()
        return replies

    async def ask(client: Any, number: int) -> str:
        reply = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": f"{number} " * 3}], max_tokens=NEW
        )
        return str(reply.choices[0].message.content)

    together = asyncio.run(ask_all())
    alone = [
        live.chat(f"{number} " * 3, max_tokens=NEW).json()["choices"][0]["message"]["content"]
        for number in range(6)
    ]
    assert together == alone and len(set(alone)) > 1


def test_litellm(live: Live, answer: str) -> None:
    litellm = pytest.importorskip("litellm")
    common: dict[str, Any] = {
        "model": f"openai/{MODEL}",
        "api_base": f"{live.url}/v1",
        "api_key": "none",
        "messages": MESSAGES,
        "max_tokens": NEW,
    }
    assert litellm.completion(**common).choices[0].message.content == answer
    pieces = [c.choices[0].delta.content or "" for c in litellm.completion(**common, stream=True)]
    assert "".join(pieces) == answer


def test_langchain(live: Live, answer: str) -> None:
    langchain = pytest.importorskip("langchain_openai")
    chat = langchain.ChatOpenAI(
        model=MODEL, base_url=f"{live.url}/v1", api_key="none", max_tokens=NEW, max_retries=0
    )
    assert chat.invoke(MESSAGES).content == answer
    assert "".join(chunk.content for chunk in chat.stream(MESSAGES)) == answer


def test_the_name_of_the_model_is_checked(live: Live) -> None:
    reply = live.client.get("/v1/models/other")
    assert reply.status_code == 404 and "one model: tiny" in reply.text
