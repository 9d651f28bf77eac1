"""`send`: input for a process that takes some; for a detached one it is on disk when answered."""

from __future__ import annotations

from typing import Any

from llmos.kernel import access, protocol
from llmos.kernel import events as ev
from llmos.kernel.connection import Connection
from llmos.kernel.errors import BadArgument
from llmos.kernel.journal import journaled
from llmos.kernel.kernel import Kernel

MOST_KEY = 64


async def handle(kernel: Kernel, request: protocol.Send, client: Connection) -> dict[str, Any]:
    if request.pid not in kernel.core.m.procs:
        await kernel.adoption.over.wait()  # an engine may know it
        access.check(kernel, request, client)
    if len(request.key) > MOST_KEY:
        raise BadArgument(f"key has {len(request.key)} characters, at most {MOST_KEY}")
    kernel.post(ev.InputGiven(request.pid, request.message, request.key))
    if journaled(kernel.core.m.find(request.pid)):
        await kernel.journal.flushed()
    return {"pid": request.pid}
