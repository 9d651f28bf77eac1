"""What a service is: a long-lived process whose methods others call by name.

A service is a class found through the entry point group `llmos.services`. The host
(`services/host.py`) makes one instance, and serves each method marked with `@call`, one
call at a time, so that a service needs no locks.

    class Weather(Service):
        name = "weather"
        summary = "Forecasts"

        @call
        def forecast(self, city: Annotated[str, "a city"], days: int = 1) -> dict[str, Any]:
            "The forecast for a city."
            place = self.call("places.find", name=city)

        @call(limit_s=600)
        def download(self) -> None:
            "All of it; takes minutes."
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Protocol, TypeVar, overload

from llmos.kernel.errors import BadArgument, NoSuchThing, ServiceFailed
from llmos.kernel.units import parse_bytes
from llmos.services.call_types import describe_arguments

F = TypeVar("F", bound=Callable[..., Any])

# A call that takes longer has hung: its service is started anew.
CALL_LIMIT_S = 30.0

# What a service may have of private memory, unless it or the configuration says otherwise.
MEMORY_BYTES = 1024**3


@overload
def call(method: F, /) -> F: ...
@overload
def call(*, limit_s: float) -> Callable[[F], F]: ...
def call(method: F | None = None, /, *, limit_s: float | None = None) -> F | Callable[[F], F]:
    """Mark a method of a service as callable by clients, programs and other services.

    `limit_s`: after so long the call has hung, and the service is started anew.
    """

    def mark(fn: F) -> F:
        fn.__llmos_call__ = {"limit_s": limit_s}  # type: ignore[attr-defined]
        return fn

    return mark if method is None else mark(method)


class Caller(Protocol):
    """How a service reaches others: the host's line to the kernel."""

    def __call__(self, method: str, arguments: dict[str, Any], limit_s: float | None) -> Any: ...


class Teller(Protocol):
    """How a service speaks without being asked; from any thread."""

    def about(self, text: str) -> None: ...
    def give_up(self, why: str) -> NoReturn: ...


class Service:
    """Base of all services. `home` is the llmos home."""

    name: ClassVar[str]
    summary: ClassVar[str]
    # It touches files that its callers name. On a machine of several users each call is then made
    # in a child that has become its caller; what it changes in memory is lost, and the child
    # counts whole for `memory`.
    as_caller: ClassVar[bool] = False
    memory: ClassVar[int | str] = MEMORY_BYTES  # bytes, or a size as in "2GiB"
    limit_s: ClassVar[float] = CALL_LIMIT_S  # of each call that names none of its own
    # Others cannot do without it: it can be restarted, and not be stopped.
    essential: ClassVar[bool] = False
    # Started at boot by itself. Else it runs when somebody has started it, and at boot once it was
    # enabled.
    at_boot: ClassVar[bool] = True

    # Set by the host before there is an instance; by a test to what should answer instead.
    caller: ClassVar[Caller | None] = None
    teller: ClassVar[Teller | None] = None

    def __init__(self, home: Path) -> None:
        self.home = home

    def close(self) -> None:
        """The host is about to end."""

    def about(self, text: str) -> None:
        """What `llmos service` shows beside its name from now on: where it listens, what it does.

        From any thread.
        """
        if self.teller is not None:
            self.teller.about(text)

    def give_up(self, why: str) -> NoReturn:
        """End at once: this process cannot go on serving. The kernel starts another one later.

        From any thread.
        """
        if self.teller is None:
            raise ServiceFailed(f"service {self.name} {why}")
        self.teller.give_up(why)

    def call(self, method: str, /, *, limit_s: float | None = None, **arguments: Any) -> Any:
        """Call another service ("models.ls"); only inside a call or the constructor.

        Waits at most `limit_s` (default: as long as that call may take). Meanwhile this service's
        own limit does not run. Raises what the other one raised; ServiceFailed where it would come
        back to a service that waits for this call.
        """
        caller = type(self).caller
        if caller is None:
            raise ServiceFailed(
                f"service {self.name} has no kernel to call {method} through",
                "in a test set Service.caller to a function that answers",
            )
        return caller(method, arguments, limit_s)


def calls_of(cls: type[Service]) -> dict[str, Callable[..., Any]]:
    """The methods of a service that may be called, by name."""
    return {
        name: member
        for name, member in inspect.getmembers(cls, inspect.isfunction)
        if getattr(member, "__llmos_call__", None)
    }


def describe(cls: type[Service]) -> dict[str, Any]:
    """A service and its calls as plain data, for the manifest. Raises TypeError, BadArgument."""
    if not (isinstance(cls, type) and issubclass(cls, Service)):
        raise TypeError(f"{cls!r} is no llmos.services.base.Service")
    memory = cls.memory
    return {
        "name": cls.name,
        "summary": cls.summary,
        "memory_bytes": parse_bytes(memory) if isinstance(memory, str) else int(memory),
        "essential": cls.essential,
        "at_boot": cls.at_boot,
        "calls": {name: _describe_call(cls, fn) for name, fn in calls_of(cls).items()},
    }


def _describe_call(cls: type[Service], fn: Callable[..., Any]) -> dict[str, Any]:
    limit_s = fn.__llmos_call__["limit_s"]  # type: ignore[attr-defined]
    return {
        "help": (inspect.getdoc(fn) or "").split("\n")[0],
        "limit_s": float(cls.limit_s if limit_s is None else limit_s),
        "args": describe_arguments(fn),
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
