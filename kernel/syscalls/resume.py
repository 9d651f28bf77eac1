"""`resume`: let a paused process go on."""

from __future__ import annotations

from typing import Any

from llmos.kernel import events as ev
from llmos.kernel import protocol
from llmos.kernel.connection import Connection
from llmos.kernel.kernel import Kernel


async def handle(kernel: Kernel, request: protocol.Resume, client: Connection) -> dict[str, Any]:
    kernel.post(ev.ResumeAsked(request.pid))
    await kernel.journal.flushed()
    proc = kernel.core.m.find(request.pid)
    return {"pid": proc.pid, "state": str(proc.state)}
