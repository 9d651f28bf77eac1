"""`services`: what is served here; start, stop, restart, enable, disable; look for changes."""

from __future__ import annotations

from typing import Any

from llmos.kernel import protocol
from llmos.kernel.connection import Connection
from llmos.kernel.errors import BadArgument
from llmos.kernel.kernel import Kernel

ACTIONS = ("start", "stop", "restart", "enable", "disable")


async def handle(kernel: Kernel, request: protocol.Services, client: Connection) -> Any:
    services = kernel.services
    await services.started.wait()
    if request.action == "ls":
        return services.shown()
    if request.action == "reload":
        return await kernel.installed.check()
    if request.action not in ACTIONS:
        known = ", ".join(("ls", "reload", *ACTIONS))
        raise BadArgument(f"action is one of {known}, not {request.action!r}")
    return await getattr(services, request.action)(request.name)
