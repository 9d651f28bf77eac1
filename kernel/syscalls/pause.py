"""`pause`: take the device from a process until a person gives it back."""

from __future__ import annotations

from typing import Any

from llmos.kernel import events as ev
from llmos.kernel import protocol
from llmos.kernel.connection import Connection
from llmos.kernel.kernel import Kernel
from llmos.kernel.process import Process

LIMIT_S = 10.0


async def handle(kernel: Kernel, request: protocol.Pause, client: Connection) -> dict[str, Any]:
    kernel.post(ev.PauseAsked(request.pid))

    def off_the_device(proc: Process) -> bool:
        queue = kernel.core.m.devices.get(proc.device)
        lease = queue.lease if queue is not None else None
        return lease is None or lease.worker_id != proc.worker_id

    proc = await kernel.changed(request.pid, off_the_device, LIMIT_S)
    await kernel.journal.flushed()
    return {"pid": proc.pid, "state": str(proc.state)}
