"""The endpoints by path."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from llmos.services.gateway import asked as requests
from llmos.services.gateway import chat, completions, models
from llmos.services.gateway.asked import Asked
from llmos.services.gateway.errors import ApiError
from llmos.services.gateway.guard import Guard
from llmos.services.gateway.keys import Keys
from llmos.services.gateway.metrics import CONTENT_TYPE
from llmos.services.gateway.run import Runner, Whose
from llmos.services.gateway.web import Events, answer, event_stream, read_json, while_there

Streamed = Callable[[Runner, Asked, Whose], Events]
Whole = Callable[[Runner, Asked, Whose], Awaitable[Any]]


class Endpoints:
    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def routes(self) -> list[Route]:
        return [
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/v1/models", self.models),
            Route("/v1/models/{model}", self.model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
        ]

    # ---- the gateway itself ----

    async def health(self, request: Request) -> Response:
        """Does a kernel answer behind it?"""
        await self.runner.kernel.ask(lambda line: line.ping())
        return answer({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        return Response(self.runner.metrics.shown(), media_type=CONTENT_TYPE)

    # ---- models ----

    async def models(self, request: Request) -> Response:
        return answer(await models.listed(self.runner.kernel, whose(request)))

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        return answer(await models.one(self.runner.kernel, name, whose(request)))

    # ---- text ----

    async def chat(self, request: Request) -> Response:
        return await self._text(request, requests.chat, chat.whole, chat.stream)

    async def completions(self, request: Request) -> Response:
        return await self._text(request, requests.completion, completions.whole, completions.stream)

    async def _text(
        self, request: Request, understand: Callable[[Any], Asked], whole: Whole, stream: Streamed
    ) -> Response:
        asked = understand(
            await read_json(request)
        )  # what is wrong is told before anybody waits for a turn
        if asked.stream:
            events = self._in_turn(asked, stream, whose(request))
            return await event_stream(request, events, self.runner.settings.stall_s)
        return await while_there(request, self._whole(asked, whole, whose(request)))

    async def _whole(self, asked: Asked, whole: Whole, for_whom: Whose) -> Response:
        async with self.runner.turnstile.turn(asked.nice):
            return answer(await whole(self.runner, asked, for_whom))

    async def _in_turn(self, asked: Asked, stream: Streamed, for_whom: Whose) -> Events:
        async with self.runner.turnstile.turn(asked.nice):
            events = stream(self.runner, asked, for_whom)
            try:
                async for some in events:
                    yield some
            finally:
                await events.aclose()


def whose(request: Request) -> Whose:
    found: Whose = request.state.whose
    return found


class _Paths:
    """The router. What it does not serve it raises, and so do the endpoints: the guard answers."""

    def __init__(self, routes: list[Route]) -> None:
        self._router = Router(routes, redirect_slashes=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self
        try:
            await self._router(scope, receive, send)
        except HTTPException as exc:
            raise ApiError(
                exc.status_code,
                f"Invalid URL ({scope['method']} {scope['path']})",
                code="unknown_url",
                headers=dict(exc.headers or {}),
            ) from None


def make(runner: Runner, keys: Keys) -> ASGIApp:
    """The application that the server runs."""
    return Guard(_Paths(Endpoints(runner).routes()), runner.settings, keys, runner.metrics)
