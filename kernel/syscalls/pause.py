"""`pause`: take the device from a process until a person gives it back, its memory too if asked."""

from __future__ import annotations

import time
from typing import Any

from llmos.kernel import events as ev
from llmos.kernel import protocol
from llmos.kernel.connection import Connection
from llmos.kernel.errors import IllegalMove
from llmos.kernel.kernel import Kernel
from llmos.kernel.process import Process, Residency

LIMIT_S = 10.0

# A checkpoint of many gigabytes takes its time, and it may wait for its turn before.
RELEASE_LIMIT_S = 300.0


async def handle(kernel: Kernel, request: protocol.Pause, client: Connection) -> dict[str, Any]:
    proc = kernel.core.m.find(request.pid)
    began, held = time.monotonic(), proc.memory.measured_bytes or proc.memory.promised_bytes
    kernel.post(ev.PauseAsked(request.pid, request.release))

    def off_the_device(proc: Process) -> bool:
        queue = kernel.core.m.devices.get(proc.device)
        return queue is None or proc.worker_id not in queue.leases

    def released(proc: Process) -> bool:
        return not proc.live or proc.residency is not Residency.DEVICE or bool(proc.move_error)

    if request.release:
        proc = await kernel.changed(request.pid, released, RELEASE_LIMIT_S)
        if proc.move_error:
            raise IllegalMove(
                f"the memory of process {proc.pid} stays where it is: {proc.move_error}",
                "it is paused; make room on the host, then ask again",
            )
        await kernel.upkeep.measure()  # free in the books is what the device reports free
        left = proc.memory.measured_bytes if proc.worker_id else 0
    else:
        proc = await kernel.changed(request.pid, off_the_device, LIMIT_S)
        left = held
    await kernel.journal.flushed()
    return {"pid": proc.pid, "state": str(proc.state), "freed_bytes": max(0, held - left),
            "seconds": round(time.monotonic() - began, 3)}  # fmt: skip
