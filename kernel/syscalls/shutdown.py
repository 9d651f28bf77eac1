"""`shutdown`: everybody to a safepoint, then the kernel ends."""

from __future__ import annotations

from typing import Any

from llmos.kernel import protocol
from llmos.kernel.connection import Connection
from llmos.kernel.kernel import Kernel


async def handle(kernel: Kernel, request: protocol.Shutdown, client: Connection) -> dict[str, Any]:
    stopped = await kernel.drain()
    kernel.stopping.set()
    return stopped
