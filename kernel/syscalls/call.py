"""`call`: call a service by name."""

from __future__ import annotations

from typing import Any

from llmos.kernel import protocol
from llmos.kernel.connection import Connection
from llmos.kernel.kernel import Kernel


async def handle(kernel: Kernel, request: protocol.Call, client: Connection) -> Any:
    return await kernel.calls.call(request.method, request.args, request.timeout_s, client.uid)
