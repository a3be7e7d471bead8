"""The application: paths, and what answers each of them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, Literal

import prometheus_client
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

import ds4jax
from ds4jax.engine.async_engine import AsyncEngine
from ds4jax.server import bodies, conversation, tokens
from ds4jax.server.access import Access, Keys
from ds4jax.server.ask import Ask
from ds4jax.server.bodies import Bodies
from ds4jax.server.conversation import Conversation, Tick
from ds4jax.server.errors import ApiError, respond
from ds4jax.server.event_stream import EventStream, unless_gone
from ds4jax.server.history import History
from ds4jax.server.metrics import Metrics
from ds4jax.server.page import PREFIX, Page
from ds4jax.server.replay import Replay
from ds4jax.server.replies.chat import ChatReply
from ds4jax.server.replies.completions import CompletionReply
from ds4jax.server.replies.messages import MessagesReply
from ds4jax.server.replies.responses import ResponsesReply
from ds4jax.server.replies.sse import Reply, dumps
from ds4jax.server.schemas import base, chat, completions, messages, responses
from ds4jax.server.stored import Stored

_LOG = logging.getLogger(__name__)

PROGRESS = 0.25  # seconds from report to report on how much of a prompt is computed, for clients that ask for these
MAX_COMPLETION = 393216  # tokens: the longest answer that the model was trained for


@dataclasses.dataclass(frozen=True)
class Options:
    """How to serve.

    keep_alive: an idle stream sends something after one to two times so many seconds. cors: origins of pages that may
    call, or "*". hosts: the names of this server, see `Access`. keys: what clients must send as
    `Authorization: Bearer` or `x-api-key`. max_body: bytes. body_timeout: seconds in which some of a body must come
    (`Bodies`). max_depth: of nested JSON. think_default: whether the model thinks where a request does not say; "asked"
    is "on", but "off" for Messages, as with Anthropic. strict: fields that are not known are refused; else a header
    and the log name them.
    """

    keep_alive: float = 10.0
    cors: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    keys: Keys = Keys()
    max_body: int = 32 << 20
    body_timeout: float = 30.0
    max_depth: int = 256
    think_default: Literal["on", "off", "asked"] = "on"
    strict: bool = False


type Work = Callable[[dict[str, Any]], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Api:
    read: Callable[[dict[str, Any]], Ask]
    reply: type[Reply]


APIS = {
    "/v1/chat/completions": Api(chat.read, ChatReply),
    "/v1/completions": Api(completions.read, CompletionReply),
    "/v1/messages": Api(messages.read, MessagesReply),
    "/v1/responses": Api(responses.read, ResponsesReply),
}

MODELS = "/v1", "", "/beta", "/anthropic/v1"  # each with /models behind it is a path of the list of models


def _aliases(path: str) -> list[str]:
    """The paths of an API: its own, the one without /v1, and those of DeepSeek's own service."""
    short = path.removeprefix("/v1")
    other = "/anthropic/v1" if short == "/messages" else "/beta"
    return [path, short, other + short]


def make_app(engine: AsyncEngine, options: Options | None = None, replay: Replay | None = None) -> ASGIApp:
    """The ASGI application that serves `engine`, which remains the caller's to close."""
    server = _Server(engine, options or Options(), Replay() if replay is None else replay)
    routes = [
        Route("/", server.page),
        Route(f"{PREFIX}{{path:path}}", server.page),
        Route("/history", server.show_history),
        Route("/health", server.health),
        Route("/v1/health", server.health),
        Route("/ping", server.health, methods=["GET", "POST"]),
        Route("/ready", server.ready),
        Route("/version", server.show(lambda engine: {"version": ds4jax.__version__})),
        Route("/tokenizer_info", server.show(tokens.tokenizer_info)),
        Route("/props", server.show(tokens.props)),
        Route("/slots", server.show(tokens.slots)),
        Route("/tokenize", server.call(server.tokenize), methods=["POST"]),
        Route("/detokenize", server.call(lambda body: tokens.detokenize(engine, body)), methods=["POST"]),
        Route("/apply-template", server.call(server.apply_template), methods=["POST"]),
        Route("/metrics", server.show_metrics),
        *(Route(f"{start}/models", server.models) for start in MODELS),
        *(Route(f"{start}/models/{{id:path}}", server.model) for start in MODELS),
        *(
            Route(f"{alias}/count_tokens", server.call(server.count_tokens), methods=["POST"])
            for alias in _aliases("/v1/messages")
        ),
        *(
            Route(f"{alias}{rest}", endpoint, methods=[method])
            for alias in _aliases("/v1/responses")
            for rest, endpoint, method in (
                ("/input_tokens", server.call(server.input_tokens), "POST"),
                ("/{id}", server.stored_response, "GET"),
                ("/{id}", server.delete_response, "DELETE"),
                ("/{id}/input_items", server.input_items, "GET"),
            )
        ),
        *(Route(alias, server.answer, methods=["POST"], name=path) for path in APIS for alias in _aliases(path)),
    ]
    options = server.options
    middleware = [
        Middleware(Access, keys=options.keys, hosts=options.hosts, origins=options.cors),
        Middleware(Bodies, most=options.max_body, timeout=options.body_timeout),
    ]
    if options.cors:  # outermost: preflights carry no key
        methods, headers = ("GET", "POST", "DELETE", "OPTIONS"), ("*",)
        cors = Middleware(CORSMiddleware, allow_origins=options.cors, allow_methods=methods, allow_headers=headers)
        middleware.insert(0, cors)
    handlers = {HTTPException: _http_error}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=server.lifespan)


class _Server:
    def __init__(self, engine: AsyncEngine, options: Options, replay: Replay):
        self.engine, self.options, self.replay = engine, options, replay
        self.metrics, self._started = Metrics(engine, replay), int(time.time())
        self.history, self._page = History(engine, replay), Page()
        self.stored = Stored(replay.notes)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Sample the engine's metrics while the server runs."""
        sampling = asyncio.create_task(self.history.run())
        yield
        sampling.cancel()

    # ---- answers -----------------------------------------------------------------------------------------------------
    async def answer(self, request: Request) -> Response:
        """One of `APIS`: an object, or a stream of events whose headers come before the prompt is computed."""
        path = request.scope["route"].name
        api, status = APIS[path], 200
        try:
            ask = await asyncio.to_thread(self._read, path, await bodies.read(request, self.options.max_depth))
            ask = dataclasses.replace(ask, client=request.state.client)
            headers = self._warn(ask)
            started = conversation.start(
                self.engine, ask, self.replay, id_prefix=api.reply.id_prefix, tick=self._tick(ask)
            )
            try:
                talks = await unless_gone(request, started)
            except ApiError as error:
                # Codex looks for this error among the events only.
                if not (ask.stream and api.reply is ResponsesReply and error.code == "context_length_exceeded"):
                    raise
                failed = self._failed(ResponsesReply.failed(ask, self._model_of(ask), error))
                return EventStream(failed, lambda: None, headers)
            reply = api.reply(talks, self._model_of(ask))
            if ask.stream:
                return EventStream(self._events(reply, talks), lambda: [talk.cancel() for talk in talks], headers)
            await unless_gone(request, conversation.run(talks))
            _check_end(talks)
            self.metrics.ended(talks)
            value = reply.whole()
            await asyncio.to_thread(reply.keep, self.stored)
            return _json(value, headers=headers)
        except ClientDisconnect:
            status = 499
            return Response(status_code=status)
        except Exception as error:
            api_error = ApiError.of(error)
            status = api_error.status
            return respond(request, api_error)
        finally:
            self.metrics.request(path, status)

    def _tick(self, ask: Ask) -> float:
        """Seconds from one sign of life to the next."""
        return min(PROGRESS, self.options.keep_alive) if ask.progress else self.options.keep_alive

    def _model_of(self, ask: Ask) -> str:
        return ask.model or self.engine.model_name

    @staticmethod
    async def _failed(data: bytes) -> AsyncIterator[bytes]:
        yield data

    async def _events(self, reply: Reply, talks: list[Conversation]) -> AsyncIterator[bytes]:
        try:
            if data := reply.begin():
                yield data
            silent = False
            async for i, event in conversation.together(talks):
                if isinstance(event, Tick):
                    if silent or reply.ask.progress:
                        yield reply.idle(event)
                    silent = True
                elif data := reply.on(event, i):
                    yield data
                    silent = False
            _check_end(talks)
            self.metrics.ended(talks)
            data = reply.end()
            await asyncio.to_thread(reply.keep, self.stored)
            yield data
        except Exception as error:
            yield reply.fail(ApiError.of(error))

    def _read(self, path: str, body: dict[str, Any]) -> Ask:
        """What a body of one of `APIS` asks for, as this server's options complete it. Raises Ds4Error."""
        api = APIS[path]
        think = self.options.think_default
        if api.reply is MessagesReply:
            ask = messages.read(body, "off" if think == "asked" else think)
        else:
            ask = responses.read(body, self.stored) if api.reply is ResponsesReply else api.read(body)
        if ask.ignored and self.options.strict:
            name, value = next(iter(ask.ignored.items()))
            raise base.wrong(name[:100], value, "nothing: it is not known")
        return dataclasses.replace(ask, think=ask.think or ("off" if think == "off" else "on"))

    @staticmethod
    def _warn(ask: Ask) -> dict[str, str]:
        """The header that names fields of the request that are not known, if there are any; they are logged, too."""
        if not ask.ignored:
            return {}
        text = json.dumps("not known, and ignored: " + ", ".join(name[:40] for name in [*ask.ignored][:20]))
        _LOG.warning("fields of a request: %s", text)
        return {"warning": f"199 ds4jax {text}"}

    def show(self, what: Callable[[AsyncEngine], Any]) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """A GET endpoint whose answer needs nothing but the engine."""

        async def endpoint(request: Request) -> Response:
            return _json(what(self.engine))

        return endpoint

    def call(self, work: Work) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """A POST endpoint: it answers with what `work`, in another thread, makes of the JSON object that was sent."""

        async def endpoint(request: Request) -> Response:
            try:
                body = await bodies.read(request, self.options.max_depth)
                return _json(await asyncio.to_thread(work, body))
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception as error:
                return respond(request, ApiError.of(error))

        return endpoint

    def prompt(self, path: str, body: dict[str, Any]) -> list[int]:
        """The token ids of the prompt that a body of one of `APIS` makes. Raises Ds4Error."""
        return conversation.render(self.engine, self._read(path, body), self.replay)

    def count_tokens(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"input_tokens": len(self.prompt("/v1/messages", body))}

    def input_tokens(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"object": "response.input_tokens", "input_tokens": len(self.prompt("/v1/responses", body))}

    def tokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        return tokens.tokenize(self.engine, body, self.chat_prompt)

    def apply_template(self, body: dict[str, Any]) -> dict[str, Any]:
        """The prompt of a chat, with control tokens spelled."""
        return {"prompt": self.engine.tokenizer.decode(self.chat_prompt(body))}

    def chat_prompt(self, body: dict[str, Any]) -> list[int]:
        return self.prompt("/v1/chat/completions", body)

    async def stored_response(self, request: Request) -> Response:
        return await self._stored(request, self.stored.response)

    async def delete_response(self, request: Request) -> Response:
        def delete(id: str) -> dict[str, Any]:
            self.stored.delete(id)
            return {"id": id, "object": "response", "deleted": True}

        return await self._stored(request, delete)

    async def input_items(self, request: Request) -> Response:
        def listed(id: str) -> dict[str, Any]:
            items, more = self.stored.page(id, request.query_params)
            ends = {"first_id": items[0]["id"] if items else None, "last_id": items[-1]["id"] if items else None}
            return {"object": "list", "data": items, **ends, "has_more": more}

        return await self._stored(request, listed)

    async def _stored(self, request: Request, work: Callable[[str], dict[str, Any]]) -> Response:
        try:
            if request.query_params.get("stream") == "true":
                raise ApiError("stream: found true, expected false: the events of a stored response are not kept")
            return _json(await asyncio.to_thread(work, request.path_params["id"]))
        except Exception as error:
            return respond(request, ApiError.of(error))

    # ---- the rest ----------------------------------------------------------------------------------------------------
    async def models(self, request: Request) -> Response:
        model = self._model(self.engine.model_name)
        ids = {"first_id": model["id"], "last_id": model["id"], "has_more": False}  # Anthropic's
        return _json({"object": "list", "data": [model], "models": [], **ids})  # Codex wants `models`, of its own kind

    async def model(self, request: Request) -> Response:
        return _json(self._model(request.path_params["id"]))

    def _model(self, id: str) -> dict[str, Any]:
        """Any name is this model. The fields are OpenAI's, vLLM's and Anthropic's."""
        ctx = self.engine.ctx
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._started))
        openai = {"id": id, "object": "model", "created": self._started, "owned_by": "ds4jax", "root": id}
        limits = {"context_length": ctx, "max_model_len": ctx, "max_completion_tokens": min(MAX_COMPLETION, ctx)}
        return {**openai, **limits, "type": "model", "display_name": id, "created_at": created}

    async def health(self, request: Request) -> Response:
        """503 if nothing is answered: the engine is stopping, hangs, or only a restart helps."""
        return self._state(self.engine.problem)

    async def ready(self, request: Request) -> Response:
        """`health`, and 503 while a new request would be refused because too many wait."""
        return self._state(self.engine.problem or ("too many requests are waiting" if self.engine.full else ""))

    def _state(self, problem: str) -> Response:
        if problem:
            return _json({"status": "error", "error": problem}, 503)
        return _json({"status": "ok", "model": self.engine.model_name})

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type=prometheus_client.CONTENT_TYPE_PLAIN_0_0_4)

    async def show_history(self, request: Request) -> Response:
        """Samples of the last minutes; ``since``: those after it, in seconds since 1970; ``last``: at most so many."""
        try:
            given = {key: float(value) for key, value in request.query_params.items() if key in ("since", "last")}
            last = given.get("last")
            return _json(self.history.since(given.get("since", 0.0), None if last is None else max(1, int(last))))
        except (ValueError, OverflowError):
            return respond(request, ApiError("since, last: found no number, expected one"))

    async def page(self, request: Request) -> Response:
        """A file of the chat page."""
        found = self._page.answer(request, request.path_params.get("path", "index.html"))
        return found or respond(request, ApiError(f"found no {request.scope['path']}", 404))


def _check_end(talks: list[Conversation]) -> None:
    """Raises ApiError if every answer ended inside a call."""
    if all(talk.finish.reason == "error" for talk in talks):
        raise ApiError("the model ended its turn inside a tool call", 500)


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(dumps(value), status, headers, media_type="application/json")


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.scope["path"]
    found = f"found {request.method} {path}, expected another method"
    text = found if error.status_code == 405 else f"found no {path}"
    return respond(request, ApiError(text, error.status_code))
