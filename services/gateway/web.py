"""HTTP beneath the endpoints: bodies in, answers and streams of events out, clients that go."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from llmos.services.gateway.errors import ApiError, api_error, bad
from llmos.services.gateway.sse import Events, event

T = TypeVar("T")

# A body must come within this, whatever its size; an upload is given longer.
BODY_S = 60.0


class Gone(Exception):
    """The client has gone: nobody is there to be answered."""


async def read_json(request: Request) -> Any:
    """The body. Raises ApiError: too large (guard.py), too slow, or no JSON."""
    try:
        async with asyncio.timeout(BODY_S):
            raw = await request.body()
    except TimeoutError:
        raise ApiError(
            408,
            f"The body of the request did not come in {BODY_S:.0f} s.",
            code="timed_out",
            headers={"Connection": "close"},
        ) from None
    except ClientDisconnect:
        raise Gone from None
    try:
        found = json.loads(raw)
        if b"\\ud" in raw or b"\\uD" in raw:  # half of a pair is no text, and nobody could send it
            json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as exc:
        raise bad(None, f"The body of the request is not JSON: {exc}.", "invalid_json") from None
    return found


async def while_there(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do something for a client, as long as it is there. To be called when the body was read.

    Raises Gone when the client goes first; `work` is cancelled then.
    """
    doing = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(until_gone(request.receive))
    try:
        await asyncio.wait((doing, gone), return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise Gone
    finally:
        for task in (doing, gone):
            task.cancel()
        # It has let go of its process before the next thing is done.
        await asyncio.gather(doing, gone, return_exceptions=True)


async def until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def answer(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse(value, status, headers)


def refusal(exc: BaseException) -> Response:
    """The answer to a request that failed."""
    error = api_error(exc)
    return JSONResponse(error.body(), error.status, error.headers)


async def event_stream(
    request: Request,
    events: Events,
    stall_s: float,
    *,
    headers: Callable[[], Mapping[str, str]] = dict,
    on_error: Callable[[dict[str, Any]], bytes] = event,
) -> Response:
    """The answer that streams `events`. It has a status only when the first one is there, so that
    what fails before is an ordinary error; what fails later is an event of its own."""
    try:
        first = await while_there(request, anext(events))
    except BaseException:
        await events.aclose()
        raise
    return EventStream(first, events, stall_s, headers(), on_error)


class EventStream(Response):
    """Server-sent events. A client that goes, or reads nothing for `stall_s`, ends it at once."""

    media_type = "text/event-stream"

    def __init__(
        self,
        first: bytes,
        events: Events,
        stall_s: float,
        headers: Mapping[str, str],
        on_error: Callable[[dict[str, Any]], bytes],
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        self._first, self._events, self._stall_s = first, events, stall_s
        self._on_error = on_error
        self._sending_since_s: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(until_gone(receive))
        try:
            while not sending.done():
                await asyncio.wait(
                    (sending, gone),
                    timeout=self._stall_s / 4,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if not sending.done() and (gone.done() or self._has_stalled()):
                    raise Gone
            sending.result()
        finally:
            for task in (sending, gone):
                task.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)
            await self._events.aclose()

    def _has_stalled(self) -> bool:
        """Has the client read nothing of what is being sent?"""
        since_s = self._sending_since_s
        return since_s is not None and time.monotonic() - since_s > self._stall_s

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await self._say(send, self._first)
        try:
            async for events in self._events:
                await self._say(send, events)
        except Exception as exc:  # noqa: BLE001  it is told to the client, and logged
            await self._say(send, self._on_error(api_error(exc).body()))
        await send(_body(b"", more=False))

    async def _say(self, send: Send, events: bytes) -> None:
        self._sending_since_s = time.monotonic()
        await send(_body(events))
        self._sending_since_s = None


def _body(data: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


Endpoint = Callable[[Request], Awaitable[Response]]
