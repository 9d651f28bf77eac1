"""`checkpoint`: have a training write a checkpoint now."""

from __future__ import annotations

from typing import Any

from llmos.kernel import events as ev
from llmos.kernel import protocol
from llmos.kernel.connection import Connection
from llmos.kernel.errors import IllegalMove
from llmos.kernel.kernel import Kernel

# It comes at the next step boundary, and the process may have to wait for its turn.
LIMIT_S = 300.0


async def handle(
    kernel: Kernel, request: protocol.Checkpoint, client: Connection
) -> dict[str, Any]:
    before = kernel.core.m.find(request.pid).checkpoint
    kernel.post(ev.CheckpointAsked(request.pid))
    proc = await kernel.changed(
        request.pid, lambda p: p.checkpoint is not before or not p.live, LIMIT_S
    )
    if proc.checkpoint is None or proc.checkpoint is before:
        raise IllegalMove(f"process {proc.pid} ended before it wrote one ({proc.reason})")
    await kernel.journal.flushed()
    return {"pid": proc.pid, **proc.checkpoint}
