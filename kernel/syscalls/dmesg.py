"""`dmesg`: the kernel's own log, from any line on."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from llmos.kernel import protocol
from llmos.kernel.connection import Connection
from llmos.kernel.dmesg import LEVELS
from llmos.kernel.errors import BadArgument
from llmos.kernel.kernel import Kernel


async def handle(
    kernel: Kernel, request: protocol.Dmesg, client: Connection
) -> AsyncGenerator[tuple[str, Any], None]:
    if request.level not in LEVELS:
        raise BadArgument(f"level is one of {', '.join(LEVELS)}, not {request.level!r}")
    log, since = kernel.dmesg, request.since
    found = log.select(since, request.pid, request.cause, request.level)
    if request.tail >= 0:
        found = found[len(found) - min(request.tail, len(found)) :]
    while True:
        for line in found:
            since = line["seq"]
            yield "item", {"offset": since, "line": line}
        if not request.follow:
            yield "end", {"offset": since}
            return
        since = max(since, log.seq)
        await log.grown()
        found = log.select(since, request.pid, request.cause, request.level)
