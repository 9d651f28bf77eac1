"""`mem`: the books of memory, by device."""

from __future__ import annotations

from typing import Any

from llmos.kernel import protocol
from llmos.kernel.connection import Connection
from llmos.kernel.kernel import Kernel


async def handle(kernel: Kernel, request: protocol.Mem, client: Connection) -> list[dict[str, Any]]:
    await kernel.upkeep.measure()  # what is shown is what is now, not what was a second ago
    return [kernel.core.m.ledger.books(name) for name in kernel.devices]
