"""The HTTP application: OpenAI's chat API, moderation by the gates, health and metrics."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from sse_starlette import EventSourceResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from vlm_safeguard.server import http_errors
from vlm_safeguard.server.audit import AuditLog, digest
from vlm_safeguard.server.completions import CHAT, Answer, check_model, safeguard, sampling_of
from vlm_safeguard.server.conversation import Conversation, read_messages
from vlm_safeguard.server.exchange import Exchange, new_id
from vlm_safeguard.server.gatekeeper import Gatekeeper
from vlm_safeguard.server.http_errors import STATUS, RequestError
from vlm_safeguard.server.inference_thread import InferenceThread
from vlm_safeguard.server.job import Begun, Sampling
from vlm_safeguard.server.schema import ChatRequest, ErrorBody, Message, ModerationRequest
from vlm_safeguard.server.settings import Settings

logger = logging.getLogger(__name__)
MODERATION = "moderation"
_GATES = "gates-only"  # the status of an answer that only tells what the gates say
_READERS = 4  # requests whose pictures are decoded at once, which bounds memory


def create_app(engine: InferenceThread, audit: AuditLog | None = None) -> FastAPI:
    """The application around an engine that was started. Its shutdown closes the engine."""
    settings = engine.settings

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(engine.close)

    app = FastAPI(
        title="VLM-Safeguard",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
        redirect_slashes=False,  # the address would be made of the client's Host header
    )
    app.add_middleware(Gatekeeper, settings=settings, telemetry=engine.telemetry)
    _handle_errors(app, settings)
    readers = CapacityLimiter(_READERS)

    async def read(messages: list[Message]) -> Conversation:
        engine.check_room()  # before any picture is decoded
        return await run_sync(read_messages, messages, settings, engine.takes, limiter=readers)

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether the inference thread lives."""
        return JSONResponse(
            {"status": "ok" if engine.alive else "dead"}, 200 if engine.alive else 503
        )

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Whether the guard passed its last self-check."""
        good = engine.alive and engine.ready.is_set()
        return JSONResponse({"ready": good}, 200 if good else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics(request: Request) -> Response:
        """Metrics of Prometheus."""
        _check_trusted(request)  # the counts tell whether a gate opened on the last request
        return Response(generate_latest(engine.telemetry.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [_model(settings)]}

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        """The one model, by its name."""
        check_model(name, settings)
        return _model(settings)

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        """Answer a conversation."""
        check_model(body.model, settings)
        sampling = sampling_of(body, settings)
        conversation = await read(body.messages)
        exchange = Exchange(
            engine,
            conversation,
            sampling,
            endpoint=CHAT,
            request_id=request.state.id,
            audit=audit,
            asked=digest(await request.body()),
        )
        begun = await _while_connected(request, exchange, exchange.begin())
        answer = Answer(settings, begun, request.state.trusted)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            return _AnswerEvents(exchange, answer, usage)
        text = await _while_connected(request, exchange, _whole(exchange))
        return JSONResponse(answer.completion(text, exchange), headers=answer.headers)

    @app.post("/v1/moderations")
    async def moderations(request: Request, body: ModerationRequest) -> Response:
        """What the gates say about texts, or about one request with pictures."""
        _check_trusted(request)
        results = []
        asked = digest(await request.body())
        for number, content in enumerate(_inputs(body, settings)):
            message = Message(role="user", content=content)
            conversation = await read([message])
            exchange = Exchange(
                engine,
                conversation,
                Sampling(max_tokens=1),
                endpoint=MODERATION,
                request_id=f"{request.state.id}-{number}",
                audit=audit,
                asked=asked,
                gates_only=True,
            )
            begun = await _while_connected(request, exchange, exchange.begin())
            await _while_connected(request, exchange, _whole(exchange))
            results.append(_moderation(begun, settings.mode))
        answer = {"id": new_id("modr"), "model": settings.model, "results": results}
        return JSONResponse(answer, headers={STATUS: _GATES})

    return app


# -- requests ------------------------------------------------------------------------------------


def _check_trusted(request: Request) -> None:
    if not request.state.trusted:
        raise RequestError(
            403, "what the gates say is shown to trusted keys only", "permission_denied"
        )


def _inputs(body: ModerationRequest, settings: Settings) -> list[Any]:
    if isinstance(body.input, str):
        return [body.input]
    if body.input and isinstance(body.input[0], str):
        if len(body.input) > settings.batch:
            raise RequestError(400, f"at most {settings.batch} texts are accepted", param="input")
        return list(body.input)
    if not body.input:
        raise RequestError(400, "input is empty", param="input")
    return [body.input]


async def _while_connected(request: Request, exchange: Exchange, work: Any) -> Any:
    """Await ``work``. If the client leaves, cancel the request."""
    task, left = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait([task, left], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RequestError(499, "the client closed the connection", "cancelled")
        return task.result()
    finally:
        left.cancel()
        if not task.done() or task.cancelled() or task.exception():
            task.cancel()
            exchange.abandon()


async def _left(request: Request) -> None:
    """Wait until the client leaves."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _whole(exchange: Exchange) -> str:
    return "".join([piece async for piece in exchange.texts()])


# -- responses -----------------------------------------------------------------------------------


class _AnswerEvents(EventSourceResponse):
    """The answer as server-sent events. Its end is the end of the request, also where the client
    left before the first frame."""

    def __init__(self, exchange: Exchange, answer: Answer, usage: bool) -> None:
        super().__init__(
            _chunks(exchange, answer, usage), headers=answer.headers, ping=15, send_timeout=30
        )
        self._exchange = exchange

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._exchange.abandon()


async def _chunks(exchange: Exchange, answer: Answer, usage: bool) -> AsyncIterator[dict[str, str]]:
    """Frames of a stream. A failure in the middle is an error frame, and no ``[DONE]`` follows."""
    try:
        yield _frame(answer.first())
        async for piece in exchange.texts():
            yield _frame(answer.chunk({"content": piece}))
        if exchange.done is None:
            raise http_errors.failed()
        yield _frame(answer.chunk({}, exchange.done.finish_reason))
        if usage:
            yield _frame(answer.last(exchange))
        yield {"data": "[DONE]"}
    except RequestError as error:
        yield _frame(error.body(answer.mode))
    except Exception as error:
        logger.error("unexpected error", extra={"error": type(error).__name__})
        yield _frame(http_errors.failed().body(answer.mode))


def _frame(value: dict[str, Any]) -> dict[str, str]:
    return {"data": json.dumps(value, ensure_ascii=False, allow_nan=False)}


def _moderation(begun: Begun, mode: str) -> dict[str, Any]:
    """One result in OpenAI's form. Of a gate that opens layers one by one, the
    score is that of the layer that says most."""
    verdict = begun.verdict
    if verdict is None:
        raise http_errors.not_ready()
    scores = {
        name: max((s for s in row if s is not None), default=None)
        for name, row in verdict.scores.items()
    }
    return {
        "flagged": verdict.fired,
        "categories": {"harmful": verdict.fired},
        "category_scores": {
            "harmful": max((s for s in scores.values() if s is not None), default=0.0)
        },
        "gates": list(verdict.gates),
        "gate_scores": scores,
        "safeguard": safeguard(_GATES, mode, begun.pictures),
    }


def _model(settings: Settings) -> dict[str, Any]:
    return {"id": settings.model, "object": "model", "created": 0, "owned_by": "vlm-safeguard"}


# -- errors --------------------------------------------------------------------------------------


def _handle_errors(app: FastAPI, settings: Settings) -> None:
    def answer(error: RequestError, **headers: str) -> JSONResponse:
        return JSONResponse(error.body(settings.mode), error.status, error.headers | headers)

    @app.exception_handler(RequestError)
    def known(request: Request, error: RequestError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(http_errors.invalid(error.errors()[0]))

    @app.exception_handler(HTTPException)
    def http(request: Request, error: HTTPException) -> JSONResponse:
        reason = {404: "no such path", 405: "this method is not allowed here"}
        text = reason.get(error.status_code, "the request cannot be read")
        return answer(RequestError(error.status_code, text), **(error.headers or {}))
