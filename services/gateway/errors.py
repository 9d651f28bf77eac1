"""Errors as OpenAI's API has them: a status, and {"error": {message, type, param, code}}."""

from __future__ import annotations

import sys
import traceback
from typing import Any

from llmos.kernel import errors as e

# How long a client is told to wait before it asks again.
SOON_S, LATER_S = 1, 5


class ApiError(Exception):
    """What a client is answered. `param` names the field of the request that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.kind = kind or _KINDS.get(status, "invalid_request_error")
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


def bad(param: str | None, message: str, code: str | None = None) -> ApiError:
    """A request whose field `param` is wrong."""
    return ApiError(400, message, param=param, code=code)


def no_model(name: str, hint: str = "") -> ApiError:
    more = f" {hint}" if hint else ""
    return ApiError(
        404, f"The model {name!r} does not exist.{more}", param="model", code="model_not_found"
    )


def no_model_here(message: str) -> ApiError:
    return ApiError(404, message, param="model", code="model_not_found")


def not_found(what: str, name: str) -> ApiError:
    return ApiError(404, f"There is no {what} {name!r}.", code="not_found")


def unavailable(message: str, after_s: int = LATER_S, code: str = "unavailable") -> ApiError:
    return ApiError(503, message, code=code, headers={"Retry-After": str(after_s)})


def api_error(exc: BaseException) -> ApiError:
    """Any exception as a client may see it: an unknown one is logged, and told as no more than
    a failure."""
    match exc:
        case ApiError():
            return exc
        case e.NoSuchThing() if "no model" in exc.message:
            return no_model_here(exc.message)
        case e.NoMemory():
            return ApiError(400, _sentence(exc), param="model", code="model_too_large")
        case e.NotAllowed():
            return ApiError(403, _sentence(exc), code="not_allowed")
        case e.BadRequest():
            long = "context holds" in exc.message
            return ApiError(
                400, _sentence(exc), code="context_length_exceeded" if long else "bad_request"
            )
        case e.Busy():
            return unavailable(_sentence(exc), LATER_S, "busy")
        case e.NoKernel() | e.HomeUnusable() | e.ServiceFailed():
            return unavailable(_sentence(exc), LATER_S, exc.code)
        case e.TimedOut():
            return ApiError(504, _sentence(exc), code="timed_out")
        case e.ProtocolError():  # what was asked for has no place in a message to the kernel
            return bad(None, exc.message, "bad_request")
        case e.LlmosError():
            return ApiError(500, _sentence(exc), code=exc.code.replace("-", "_"))
        case _:
            sys.stderr.write("".join(traceback.format_exception(exc)))
            return ApiError(
                500,
                "The gateway failed; its log has the story (`llmos service logs gateway`).",
                code="internal_error",
            )


def _sentence(exc: e.LlmosError) -> str:
    return f"{exc.message} ({exc.hint})" if exc.hint else exc.message
