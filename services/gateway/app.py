"""The endpoints by path."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from llmos.services.gateway import asked as requests
from llmos.services.gateway import chat, completions, embeddings, models, responses
from llmos.services.gateway.asked import Asked
from llmos.services.gateway.batches import Batches
from llmos.services.gateway.errors import ApiError
from llmos.services.gateway.files import Files
from llmos.services.gateway.fine_tuning import Jobs
from llmos.services.gateway.guard import Guard
from llmos.services.gateway.keys import Keys
from llmos.services.gateway.metrics import CONTENT_TYPE, Metrics
from llmos.services.gateway.responses import Responses
from llmos.services.gateway.run import Runner, Whose
from llmos.services.gateway.settings import Settings
from llmos.services.gateway.sse import Events, event
from llmos.services.gateway.turnstile import Turnstile
from llmos.services.gateway.web import Endpoint, answer, event_stream, read_json, while_there


class Endpoints:
    """What is served. `folder` is the gateway's own, in the home."""

    def __init__(
        self,
        home: Path,
        folder: Path,
        runner: Runner,
        settings: Settings,
        turnstile: Turnstile,
        metrics: Metrics,
    ) -> None:
        self.runner, self.settings = runner, settings
        self.turnstile, self.counted = turnstile, metrics
        self.files = Files(folder / "files")
        self.batches = Batches(folder / "batches", self.files, runner, settings.batch_active)
        self.jobs = Jobs(folder / "jobs", home, self.files, runner.kernel)
        self.responses = Responses(folder / "responses", runner)

    def routes(self) -> list[Route]:
        files, batches, jobs, responses = self.files, self.batches, self.jobs, self.responses
        job = "/v1/fine_tuning/jobs/{id}"
        return [
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/v1/models", self.models),
            Route("/v1/models/{model}", self.model),
            post("/v1/chat/completions", self.chat),
            post("/v1/completions", self.completions),
            post("/v1/embeddings", self.embeddings),
            post("/v1/responses", self.response),
            Route("/v1/responses/{id}", of_one(responses.one)),
            Route("/v1/responses/{id}", of_one(responses.delete), methods=["DELETE"]),
            post("/v1/responses/{id}/cancel", of_one(responses.cancel)),
            Route("/v1/responses/{id}/input_items", in_one(responses.items)),
            post("/v1/files", of_all(files.upload)),
            Route("/v1/files", of_all(files.listed)),
            Route("/v1/files/{id}", of_one(files.one)),
            Route("/v1/files/{id}", of_one(files.delete), methods=["DELETE"]),
            Route("/v1/files/{id}/content", of_one(files.send)),
            post("/v1/fine_tuning/jobs", of_all(jobs.create)),
            Route("/v1/fine_tuning/jobs", of_all(jobs.listed)),
            Route(job, of_one(jobs.one)),
            post(f"{job}/cancel", of_one(jobs.cancel)),
            post(f"{job}/pause", of_one(jobs.pause)),
            post(f"{job}/resume", of_one(jobs.resume)),
            Route(f"{job}/events", in_one(jobs.events)),
            Route(f"{job}/checkpoints", in_one(jobs.checkpoints)),
            post("/v1/batches", of_all(batches.create)),
            Route("/v1/batches", of_all(batches.listed)),
            Route("/v1/batches/{id}", of_one(batches.one)),
            post("/v1/batches/{id}/cancel", of_one(batches.cancel)),
        ]

    # ---- the gateway itself ----

    async def health(self, request: Request) -> Response:
        """Does a kernel answer behind it?"""
        await self.runner.kernel.ask(lambda line: line.ping())
        return answer({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        return Response(self.counted.shown(), media_type=CONTENT_TYPE)

    # ---- models ----

    async def models(self, request: Request) -> Response:
        return answer(await models.listed(self.runner.kernel, whose(request)))

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        return answer(await models.one(self.runner.kernel, name, whose(request)))

    # ---- what models say ----
    #
    # What is wrong with a request is told before anybody waits for a turn.

    async def chat(self, request: Request) -> Response:
        asked, for_whom = requests.chat(await read_json(request)), whose(request)
        if asked.stream:
            return await self._stream(request, asked, chat.stream(self.runner, asked, for_whom))
        return await self._whole(
            request, asked.nice, lambda: chat.whole(self.runner, asked, for_whom)
        )

    async def completions(self, request: Request) -> Response:
        asked, for_whom = requests.completion(await read_json(request)), whose(request)
        if asked.stream:
            events = completions.stream(self.runner, asked, for_whom)
            return await self._stream(request, asked, events)
        return await self._whole(
            request, asked.nice, lambda: completions.whole(self.runner, asked, for_whom)
        )

    async def embeddings(self, request: Request) -> Response:
        asked, for_whom = requests.embedding(await read_json(request)), whose(request)
        return await self._whole(
            request, asked.nice, lambda: embeddings.whole(self.runner, asked, for_whom)
        )

    async def response(self, request: Request) -> Response:
        for_whom = whose(request)
        turn = self.responses.understand(await read_json(request), for_whom)
        if turn.asked.stream:
            events = self.responses.stream(turn, for_whom)
            return await self._stream(request, turn.asked, events, responses.failed)
        return await self._whole(
            request, turn.asked.nice, lambda: self.responses.whole(turn, for_whom)
        )

    async def _whole(
        self, request: Request, nice: int, make: Callable[[], Awaitable[dict[str, Any]]]
    ) -> Response:
        async def in_turn() -> Response:
            async with self.turnstile.turn(nice):
                return answer(await make())

        return await while_there(request, in_turn())

    async def _stream(
        self,
        request: Request,
        asked: Asked,
        events: Events,
        on_error: Callable[[dict[str, Any]], bytes] = event,
    ) -> Response:
        async def in_turn() -> Events:
            try:
                async with self.turnstile.turn(asked.nice):
                    async for some in events:
                        yield some
            finally:
                await events.aclose()

        return await event_stream(request, in_turn(), self.settings.stall_s, on_error=on_error)


# ---- routes ----

OfAll = Callable[[Request, Whose], Awaitable[Response]]
OfOne = Callable[[str, Whose], Awaitable[Response]]
InOne = Callable[[str, Request, Whose], Awaitable[Response]]


def post(path: str, endpoint: Endpoint) -> Route:
    return Route(path, endpoint, methods=["POST"])


def of_all(do: OfAll) -> Endpoint:
    """An endpoint about a whole list of things."""

    async def endpoint(request: Request) -> Response:
        return await do(request, whose(request))

    return endpoint


def of_one(do: OfOne) -> Endpoint:
    """An endpoint about one thing, by its id."""

    async def endpoint(request: Request) -> Response:
        return await do(request.path_params["id"], whose(request))

    return endpoint


def in_one(do: InOne) -> Endpoint:
    """An endpoint about a list that one thing has."""

    async def endpoint(request: Request) -> Response:
        return await do(request.path_params["id"], request, whose(request))

    return endpoint


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


def make(endpoints: Endpoints, keys: Keys) -> ASGIApp:
    """The application that the server runs."""
    paths = _Paths(endpoints.routes())
    return Guard(paths, endpoints.settings, keys, endpoints.counted)
