"""Who may ask, from where, and how much: what is looked at before an endpoint is reached.

Origin and host   a page in a browser must not reach a gateway on this machine by itself
Key               where there are keys, or others than this machine can connect
Size              of the body: by its announced length before it is read, else while it comes
"""

from __future__ import annotations

import ipaddress
import os
import pwd
import time
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmos.services.gateway.errors import ApiError, api_error
from llmos.services.gateway.ids import new_id
from llmos.services.gateway.keys import Keys
from llmos.services.gateway.metrics import Metrics
from llmos.services.gateway.run import Whose
from llmos.services.gateway.settings import Settings
from llmos.services.gateway.web import Gone, refusal

# What anybody may ask who can connect.
OPEN = ("/health",)

CLIENT_GONE = 499  # nobody hears it; it is what the metrics call a request whose client went

CORS_HEADERS = "authorization, content-type, x-api-key"
CORS_AGE_S = "600"


class Guard:
    """The outermost application. It turns every failure into an answer in OpenAI's form."""

    def __init__(self, app: ASGIApp, settings: Settings, keys: Keys, metrics: Metrics) -> None:
        self._app, self._settings, self._keys, self._metrics = app, settings, keys, metrics
        self._own = pwd.getpwuid(os.getuid()).pw_name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s = time.monotonic()
        cors = self._cors(Headers(scope=scope))
        told = _Told(send, {"X-Request-Id": new_id("req"), **cors})
        self._metrics.in_flight.inc()
        try:
            await self._serve(scope, receive, told)
        finally:
            self._metrics.in_flight.dec()
            # Of a path that nobody serves only that is counted, or anybody could make labels.
            route = scope.get("route")
            endpoint = getattr(route, "path", "other")
            self._metrics.requests.labels(endpoint, str(told.status)).inc()
            self._metrics.seconds.labels(endpoint).observe(time.monotonic() - began_s)

    async def _serve(self, scope: Scope, receive: Receive, send: _Told) -> None:
        headers = Headers(scope=scope)
        body = _Limited(receive, self._most_bytes(scope["path"]), headers)
        try:
            self._check_origin(headers)
            if scope["method"] == "OPTIONS" and "origin" in headers:
                await send.empty(204)
                return
            scope.setdefault("state", {})["whose"] = self._whose(scope["path"], headers)
            body.check()
            await self._app(scope, body, send)
        except Gone:
            self._metrics.gone.inc()
            send.status = CLIENT_GONE
        except Exception as exc:  # noqa: BLE001  it is answered, and logged
            if send.begun:
                api_error(exc)
                return
            response = refusal(exc)
            if body.unread:
                response.headers["Connection"] = "close"
            await response(scope, receive, send)

    # ---- where from ----

    def _check_origin(self, headers: Mapping[str, str]) -> None:
        """Raise ApiError for a page of somebody else's, and for a name that leads here by a trick
        (DNS rebinding): such a request comes from this machine, and is not its user's."""
        origin = headers.get("origin")
        if origin is not None and not self._may_ask(origin):
            raise ApiError(
                403,
                f"Pages of {origin[:200]} may not ask this gateway: `llmos serve --cors ORIGIN` "
                "lets them.",
                code="origin_not_allowed",
            )
        if self._settings.is_loopback and not _is_local(headers.get("host", "")):
            raise ApiError(
                403,
                "This gateway serves its own machine, by the name localhost or "
                "its loopback address.",
                code="host_not_allowed",
            )

    def _may_ask(self, origin: str) -> bool:
        return "*" in self._settings.cors or origin in self._settings.cors

    def _cors(self, headers: Mapping[str, str]) -> dict[str, str]:
        origin = headers.get("origin")
        if origin is None or not self._may_ask(origin):
            return {}
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
            "Access-Control-Allow-Headers": CORS_HEADERS,
            "Access-Control-Max-Age": CORS_AGE_S,
            "Vary": "Origin",
        }

    # ---- who ----

    def _whose(self, path: str, headers: Mapping[str, str]) -> Whose:
        """Raises ApiError (401) without a key where one is needed."""
        scheme, _, presented = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            presented = headers.get("x-api-key", "")
        needed = bool(self._keys.all()) or not self._settings.is_loopback
        if not needed or path in OPEN:
            return Whose()
        if not presented:
            raise ApiError(
                401,
                "You didn't provide an API key: send it as 'Authorization: Bearer "
                "KEY'. `llmos key new` makes one.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        key = self._keys.find(presented.strip())
        if key is None:
            raise ApiError(
                401,
                "Incorrect API key provided.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        user = "" if key.user == self._own else key.user
        return Whose(user, user)

    # ---- how much ----

    def _most_bytes(self, path: str) -> int:
        # A file comes in a form: with its fields, and the form's own lines.
        if path == "/v1/files":
            return self._settings.max_file + (64 << 10)
        return self._settings.max_body


class _Limited:
    """A body that is refused when it is too large."""

    def __init__(self, receive: Receive, most_bytes: int, headers: Mapping[str, str]) -> None:
        self._receive, self._most_bytes = receive, most_bytes
        self._nbytes = 0
        length = headers.get("content-length", "")
        self._length = int(length) if length.isdecimal() else 0
        # Is there some of it that nobody has read?
        self.unread = self._length > 0 or "transfer-encoding" in headers

    def check(self) -> None:
        if self._length > self._most_bytes:
            raise self._too_large()

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._nbytes += len(message.get("body", b""))
            self.unread = bool(message.get("more_body"))
            if self._nbytes > self._most_bytes:
                raise self._too_large()
        return message

    def _too_large(self) -> ApiError:
        self.unread = True
        return ApiError(
            413,
            f"The body of the request is too large: at most {self._most_bytes:,} bytes are taken.",
            code="request_too_large",
        )


class _Told:
    """`send`, with what was sent remembered."""

    def __init__(self, send: Send, headers: dict[str, str]) -> None:
        self._send, self._headers = send, headers
        self.status = 0
        self.begun = False

    async def __call__(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status, self.begun = message["status"], True
            MutableHeaders(scope=message).update(self._headers)
        await self._send(message)

    async def empty(self, status: int) -> None:
        await self({"type": "http.response.start", "status": status, "headers": []})
        await self({"type": "http.response.body", "body": b""})


def _is_local(host: str) -> bool:
    """Is a Host header one of this machine itself?"""
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    name = name.strip("[]")
    if name.lower() in ("localhost", ""):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
