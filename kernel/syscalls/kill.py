"""`kill`: end a process, or pause and continue it by signal."""

from __future__ import annotations

from typing import Any

from llmos.kernel import events as ev
from llmos.kernel import protocol
from llmos.kernel.connection import Connection
from llmos.kernel.kernel import Kernel
from llmos.kernel.syscalls import pause, resume

# A worker that does not die of the signal within this is told by name.
LIMIT_S = 30.0


async def handle(kernel: Kernel, request: protocol.Kill, client: Connection) -> dict[str, Any]:
    if request.signal == 19:
        return await pause.handle(kernel, protocol.Pause(request.pid), client)
    if request.signal == 18:
        return await resume.handle(kernel, protocol.Resume(request.pid), client)
    kernel.post(ev.KillAsked(request.pid, request.signal))
    proc = await kernel.changed(request.pid, lambda p: not p.live, LIMIT_S)
    await kernel.journal.flushed()
    return {"pid": proc.pid, "state": str(proc.state), "exit_status": proc.exit_status}
