"""`renice`: change how much of a device a process gets, while it waits or runs."""

from __future__ import annotations

from typing import Any

from llmos.kernel import events as ev
from llmos.kernel import protocol
from llmos.kernel.connection import Connection
from llmos.kernel.kernel import Kernel


async def handle(kernel: Kernel, request: protocol.Renice, client: Connection) -> dict[str, Any]:
    kernel.post(ev.ReniceAsked(request.pid, request.nice))
    await kernel.journal.flushed()
    return {"pid": request.pid, "nice": request.nice}
