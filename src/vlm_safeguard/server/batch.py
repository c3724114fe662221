"""Answers a batch of chat requests through an inference thread, as the server answers each."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.server import http_errors
from vlm_safeguard.server.audit import digest
from vlm_safeguard.server.batch_file import Task
from vlm_safeguard.server.body import check_json
from vlm_safeguard.server.completions import CHAT, Answer, check_model, sampling_of
from vlm_safeguard.server.conversation import Conversation
from vlm_safeguard.server.exchange import Exchange
from vlm_safeguard.server.http_errors import RequestError
from vlm_safeguard.server.inference_thread import InferenceThread
from vlm_safeguard.server.job import Sampling
from vlm_safeguard.server.picture_memory import PictureMemory
from vlm_safeguard.server.schema import ChatRequest

_PAUSE = 0.1  # seconds until a request that found the queue full is tried again


def answer_all(
    engine: InferenceThread, tasks: Sequence[Task], put: Callable[[dict[str, Any]], None]
) -> None:
    """Answer requests, several at once, each as soon as it can be.

    Args:
        engine: was started.
        tasks: the requests.
        put: gets each answer, in OpenAI's form, in the order in which they come.

    Raises:
        SafeguardError: the guard failed its self-check, and what has no answer yet gets none.
    """

    async def run() -> None:
        async for answer in _answers(engine, tasks):
            put(answer)

    asyncio.run(run())


async def _answers(engine: InferenceThread, tasks: Sequence[Task]) -> AsyncIterator[dict[str, Any]]:
    waiting, memory = iter(tasks), PictureMemory(engine.settings.max_waiting_pixels)
    running: set[asyncio.Task[dict[str, Any]]] = set()
    try:
        while True:
            for task in waiting:
                running.add(asyncio.create_task(_line(engine, task, memory)))
                if len(running) >= 2 * engine.settings.batch:
                    break
            if not running:
                return
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for one in done:
                yield one.result()
    finally:
        for one in running:
            one.cancel()


async def _line(engine: InferenceThread, task: Task, memory: PictureMemory) -> dict[str, Any]:
    """A line of the batch's answers."""
    line: dict[str, Any] = {"id": task.id, "custom_id": task.custom_id}
    try:
        status, body = 200, await _completion(engine, task, memory)
    except RequestError as error:
        if error.status >= 500:
            told = {"code": error.kind, "message": str(error)}
            return line | {"response": None, "error": told}
        status, body = error.status, error.body(engine.settings.mode)
    response = {"status_code": status, "request_id": task.id, "body": body}
    return line | {"response": response, "error": None}


async def _completion(
    engine: InferenceThread, task: Task, memory: PictureMemory
) -> Mapping[str, Any]:
    settings, data = engine.settings, json.dumps(task.body).encode()
    if len(data) > settings.max_body:
        raise RequestError(413, f"a body has at most {settings.max_body} bytes")
    check_json(data)
    try:
        body = ChatRequest.model_validate(task.body)
    except ValidationError as error:
        raise http_errors.invalid(error.errors()[0]) from None
    if body.stream:
        raise RequestError(400, "a batch does not stream: leave stream out", param="stream")
    check_model(body.model, settings)
    sampling = sampling_of(body, settings)
    async with memory.conversation(body.messages, settings, engine.takes) as conversation:
        return await _answer(engine, task, conversation, sampling, digest(data))


async def _answer(
    engine: InferenceThread,
    task: Task,
    conversation: Conversation,
    sampling: Sampling,
    asked: str,
) -> Mapping[str, Any]:
    while True:
        exchange = Exchange(
            engine,
            conversation,
            sampling,
            endpoint=CHAT,
            request_id=task.id,
            audit=None,
            asked=asked,
        )
        try:
            begun = await exchange.begin()
            text = "".join([piece async for piece in exchange.texts()])
            return Answer(engine.settings, begun, trusted=True).completion(text, exchange)
        except RequestError as error:
            if error.status == 503 and engine.alive:
                raise SafeguardError(f"{error}. The same command goes on") from error
            if error.status == 503:
                raise SafeguardError(
                    "what runs the model ended: see the log. The same command goes on"
                ) from error
            if error.status != 429:
                raise
        finally:
            exchange.abandon()
        await asyncio.sleep(_PAUSE)
