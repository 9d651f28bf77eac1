"""What a service is: a long-lived process whose methods others call by name.

A service is a class found through the entry point group `llmos.services`. The host
(`services/host.py`) makes one instance, and serves each method marked with `@call`, one
call at a time, so that a service needs no locks.

    class Weather(Service):
        name = "weather"
        summary = "Forecasts"

        @call
        def forecast(self, city: str, days: int = 1) -> dict[str, Any]:
            "The forecast for a city."
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

from llmos.kernel.errors import BadArgument, NoSuchThing

F = TypeVar("F", bound=Callable[..., Any])


def call(method: F) -> F:
    """Mark a method of a service as callable by clients, programs and other services."""
    method.__llmos_call__ = True  # type: ignore[attr-defined]
    return method


class Service:
    """Base of all services. `home` is the llmos home."""

    name: ClassVar[str]
    summary: ClassVar[str]

    def __init__(self, home: Path) -> None:
        self.home = home

    def close(self) -> None:
        """The host is about to end."""


def calls_of(cls: type[Service]) -> dict[str, Callable[..., Any]]:
    """The methods of a service that may be called, by name."""
    return {
        name: member
        for name, member in inspect.getmembers(cls, inspect.isfunction)
        if getattr(member, "__llmos_call__", False)
    }


def describe(cls: type[Service]) -> dict[str, Any]:
    """The calls of a service as plain data, for the manifest."""
    return {
        "name": cls.name,
        "summary": cls.summary,
        "calls": {name: _describe_call(fn) for name, fn in calls_of(cls).items()},
    }


def _describe_call(fn: Callable[..., Any]) -> dict[str, Any]:
    hints = get_type_hints(fn)
    parameters = list(inspect.signature(fn).parameters.values())[1:]
    return {
        "help": (inspect.getdoc(fn) or "").split("\n")[0],
        "args": [
            {
                "name": p.name,
                "type": getattr(hints.get(p.name, str), "__name__", str(hints.get(p.name))),
                "required": p.default is p.empty,
                "default": None if p.default is p.empty else p.default,
            }
            for p in parameters
        ],
    }


def invoke(service: Service, method: str, arguments: dict[str, Any]) -> Any:
    """Call a method by name with checked argument names. Raises NoSuchThing, BadArgument."""
    known = calls_of(type(service))
    if method not in known:
        names = ", ".join(sorted(known))
        raise NoSuchThing(f"service {service.name} has no call {method!r}", f"it has {names}")
    bound = known[method].__get__(service)
    try:
        inspect.signature(bound).bind(**arguments)
    except TypeError as exc:
        raise BadArgument(f"{service.name}.{method}: {exc}") from None
    return bound(**arguments)
