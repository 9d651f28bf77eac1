"""`checkpoint`: have a training write a checkpoint now."""

from __future__ import annotations

from typing import Any

from llmos.kernel import events as ev
from llmos.kernel import protocol
from llmos.kernel.connection import Connection
from llmos.kernel.errors import HomeUnusable, IllegalMove
from llmos.kernel.kernel import Kernel
from llmos.kernel.process import Process

# It comes at the next step boundary, and the process may have to wait for its turn.
LIMIT_S = 300.0


async def handle(
    kernel: Kernel, request: protocol.Checkpoint, client: Connection
) -> dict[str, Any]:
    proc = kernel.core.m.find(request.pid)
    before, worker, proc.move_error = proc.checkpoint, kernel.core.m.worker_of(proc), ""
    kernel.post(ev.CheckpointAsked(request.pid))
    # One may be under way: that of an earlier step is not the answer.
    asked = (worker.last_step or 0) if worker is not None and worker.reports else 0

    def answered(p: Process) -> bool:
        if p.checkpoint is None or p.checkpoint is before:
            return not p.live or bool(p.move_error)
        same = worker is not None and p.worker_id == worker.worker_id
        return not same or p.checkpoint["step"] >= asked or not p.live or bool(p.move_error)

    proc = await kernel.changed(request.pid, answered, LIMIT_S)
    if proc.live and proc.move_error:
        raise HomeUnusable(proc.move_error, "it goes on, and tries again after its interval")
    if proc.checkpoint is None or proc.checkpoint is before:
        raise IllegalMove(f"process {proc.pid} ended before it wrote one ({proc.reason})")
    await kernel.journal.flushed()
    return {"pid": proc.pid, **proc.checkpoint}
