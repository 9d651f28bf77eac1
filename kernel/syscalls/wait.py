"""`wait`: answer when a process has ended."""

from __future__ import annotations

from typing import Any

from llmos.kernel import protocol
from llmos.kernel.connection import Connection
from llmos.kernel.kernel import Kernel
from llmos.kernel.process import Process


async def handle(kernel: Kernel, request: protocol.Wait, client: Connection) -> dict[str, Any]:
    proc = await kernel.changed(request.pid, lambda p: not p.live, request.timeout_s)
    await kernel.journal.flushed()
    return outcome(proc)


def outcome(proc: Process) -> dict[str, Any]:
    return {
        "pid": proc.pid,
        "exit_status": proc.exit_status,
        "reason": proc.reason,
        "result": proc.result,
    }
