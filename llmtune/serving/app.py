"""The routes of the server."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack, aclosing
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from llmtune import __version__
from llmtune.inference.said import SaidPiece
from llmtune.model.generate import alike_up_to, limit_of
from llmtune.serving.answering import Answering, Server, while_there
from llmtune.serving.bodies import Answered, ChatRequest, ErrorBody, Model, ModelList, TextRequest
from llmtune.serving.choices import Choice
from llmtune.serving.errors import Refused
from llmtune.serving.guard import Counted, Guard
from llmtune.serving.models import ModelOffer

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request cannot be answered."},
    "5XX": {"model": ErrorBody, "description": "The server could not answer."},
}
_STREAMS: dict[int | str, dict[str, Any]] = {
    **_ERRORS, 200: {"model": Answered, "content": {"text/event-stream": {"schema": {"type": "string"}}}}
}  # fmt: skip


def make_app(server: Server) -> FastAPI:
    """The server's application."""
    key = [] if server.config.api_key is None else [Depends(HTTPBearer(auto_error=False))]
    app = FastAPI(
        title="llmtune", version=__version__, docs_url=None, redoc_url=None,
    )  # fmt: skip
    app.root_path = server.config.root_path  # uvicorn's own option would need it in front of every path

    @app.get("/health", responses=_ERRORS)
    async def health() -> dict[str, str]:
        """Whether the server answers."""
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse, responses=_ERRORS, dependencies=key)
    async def metrics() -> Response:
        """What the server counts, for Prometheus."""
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", responses=_ERRORS, dependencies=key)
    async def models() -> ModelList:
        """The models that requests may name."""
        return ModelList(data=[_told(server, offer) for offer in server.offers])

    @app.get("/v1/models/{model:path}", responses=_ERRORS, dependencies=key)
    async def model(model: str) -> Model:
        """One of them."""
        return _told(server, server.offer(model))

    @app.post("/v1/chat/completions", response_model=None, responses=_STREAMS, dependencies=key)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answers a conversation."""
        return await _respond(server, ChatForm(body.model, bool(body.logprobs)), body, request)

    @app.post("/v1/completions", response_model=None, responses=_STREAMS, dependencies=key)
    async def complete(body: TextRequest, request: Request) -> Response:
        """Continues texts."""
        return await _respond(server, TextForm(body.model, body.logprobs is not None), body, request)

    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _not_found)
    app.add_exception_handler(Exception, _broken)
    app.add_middleware(Guard, api_key=server.config.api_key, max_body_bytes=int(server.config.max_body_mb * 1e6))
    app.add_middleware(Counted, requests=server.metrics.requests)
    return app


def _told(server: Server, offer: ModelOffer) -> Model:
    return Model(id=offer.name, created=server.started, max_model_len=min(
        (each for each in (limit_of(offer.model_config, offer.config), alike_up_to(offer.model_config)) if each),
        default=None,
    ))  # fmt: skip


class ChatForm:
    """How answers to conversations are written."""

    whole, piece = "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, logprobs: bool) -> None:
        self.model, self.logprobs = model, logprobs
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def first(self, choice: Choice) -> Iterator[dict[str, Any]]:
        """What a stream tells before the first piece of an answer."""
        yield {"index": choice.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}

    def told(self, choice: Choice, pieces: list[SaidPiece]) -> Iterator[dict[str, Any]]:
        """The pieces of an answer for a stream, and its end."""
        deltas: list[dict[str, Any]] = [
            {"reasoning_content" if piece.kind == "thinking" else "content": piece.text} for piece in pieces
        ]
        if choice.ended and choice.calls:
            deltas.append({"tool_calls": [{"index": at, **call} for at, call in enumerate(choice.calls)]})
        if not deltas and self.logprobs and choice.pending:
            deltas.append({"content": ""})
        for delta in deltas:
            logprobs = {"logprobs": choice.chat_logprobs()} if self.logprobs else {}
            yield {"index": choice.index, "delta": delta, **logprobs, "finish_reason": None}
        if choice.ended:
            yield {"index": choice.index, "delta": {}, "finish_reason": choice.reason}

    def finished(self, choice: Choice, pieces: list[SaidPiece]) -> dict[str, Any]:
        """A whole answer."""
        text, thoughts = ("".join(each.text for each in pieces if each.kind == kind) for kind in ("text", "thinking"))
        calls = choice.calls
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
        if thoughts:
            message["reasoning_content"] = thoughts
        if calls:
            message["tool_calls"] = calls
        logprobs = choice.chat_logprobs() if self.logprobs else None
        return {"index": choice.index, "message": message, "logprobs": logprobs, "finish_reason": choice.reason}


class TextForm:
    """How continued texts are written."""

    whole = piece = "text_completion"

    def __init__(self, model: str, logprobs: bool) -> None:
        self.model, self.logprobs = model, logprobs
        self.head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.sizes: dict[int, int] = {}
        """Characters that have been told of each answer."""

    def first(self, choice: Choice) -> Iterator[dict[str, Any]]:
        """Nothing is told before the first piece."""
        yield from ()

    def told(self, choice: Choice, pieces: list[SaidPiece]) -> Iterator[dict[str, Any]]:
        """The pieces of an answer for a stream, and its end."""
        if pieces or choice.ended:
            yield self.finished(choice, pieces)

    def finished(self, choice: Choice, pieces: list[SaidPiece]) -> dict[str, Any]:
        """A piece of an answer, or all of it."""
        text, offset = "".join(piece.text for piece in pieces), self.sizes.get(choice.index, 0)
        self.sizes[choice.index] = offset + len(text)
        logprobs = choice.text_logprobs(offset) if self.logprobs else None
        reason = choice.reason if choice.ended else None
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": reason}


async def _respond(
    server: Server, form: ChatForm | TextForm, body: ChatRequest | TextRequest, request: Request
) -> Response:
    if body.stream_options is not None and not body.stream:
        raise Refused(400, "stream_options: needs stream: true", param="stream_options")
    with ExitStack() as places:
        places.enter_context(server.places(body.answers))
        answering = await server.read(body, places)
        if not body.stream:
            found = await while_there(request, _whole(answering, form))
            return JSONResponse(found) if found is not None else Response(status_code=499)
        usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(_events(answering, form, usage), places.pop_all())


class EventStream(StreamingResponse):
    """A stream of events that has its places until it ends, or its client has gone."""

    def __init__(self, events: AsyncGenerator[str], places: ExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.events, self.places = events, places

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.events.aclose()  # a client may leave between two events
            self.places.close()


async def _whole(answering: Answering, form: ChatForm | TextForm) -> dict[str, Any]:
    told: list[list[SaidPiece]] = [[] for _ in answering.choices]
    async for choice, pieces in answering.pieces():
        told[choice.index] += pieces
    choices = [form.finished(choice, told[choice.index]) for choice in answering.choices]
    return {**form.head, "object": form.whole, "choices": choices, "usage": answering.usage}


async def _events(answering: Answering, form: ChatForm | TextForm, usage: bool) -> AsyncGenerator[str]:
    head = {**form.head, "object": form.piece}
    try:
        for choice in answering.choices:
            for each in form.first(choice):
                yield _event({**head, "choices": [each]})
        async with aclosing(answering.pieces()) as found:
            async for choice, pieces in found:
                for each in form.told(choice, list(pieces)):
                    yield _event({**head, "choices": [each]})
        if usage:
            yield _event({**head, "choices": [], "usage": answering.usage})
    except Refused as refused:
        yield _event(refused.body)
    yield "data: [DONE]\n\n"


def _event(told: Any) -> str:
    return f"data: {json.dumps(told, ensure_ascii=False)}\n\n"


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error.response()


async def _invalid(request: Request, error: Exception) -> Response:
    """All that is wrong with a body, in one sentence each."""
    assert isinstance(error, RequestValidationError)
    said = []
    for each in error.errors():
        place = ".".join(str(part) for part in each["loc"][1:] if isinstance(part, int) or part.isidentifier())
        told = each["msg"].removeprefix("Value error, ")
        if each["type"] == "json_invalid":
            place, told = "body", f"is no JSON: {each['ctx']['error']}, after {place} characters"
        said.append(f"{place or 'body'}: {told}")
    param = said[0].partition(":")[0]
    return Refused(400, "; ".join(dict.fromkeys(said)), param=None if param == "body" else param).response()


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = f"{request.method} {request.url.path}: {error.detail}"
    return Refused(error.status_code, said, headers=error.headers).response()


async def _broken(request: Request, error: Exception) -> Response:
    return Refused(500, f"{type(error).__name__}: {error}").response()
