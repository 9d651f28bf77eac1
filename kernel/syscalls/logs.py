"""`logs`: stream what a process printed, as bytes."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from llmos.kernel import protocol
from llmos.kernel.connection import Connection
from llmos.kernel.errors import BadArgument
from llmos.kernel.kernel import Kernel
from llmos.kernel.streams import first_data, read_bytes, tail_offset

# A process prints without telling the kernel: a reader that follows looks this often.
LOOK_S = 0.2


async def handle(
    kernel: Kernel, request: protocol.Logs, client: Connection
) -> AsyncGenerator[tuple[str, Any], None]:
    if request.offset < 0:
        raise BadArgument(f"offset is 0 or more, not {request.offset}")
    proc = kernel.core.m.find(request.pid)
    path = kernel.home.work(proc.pid) / "log"
    offset = tail_offset(path, request.tail) if request.tail >= 0 else request.offset
    while True:
        ended = not proc.live
        goes_on = first_data(path, offset)
        if goes_on != offset:
            size = kernel.config.log_size
            note = f"[the log is kept to {size:,} bytes: what came before is gone]\n"
            offset = goes_on
            yield "item", {"offset": offset, "data": note.encode()}
        data = read_bytes(path, offset)
        if data:
            offset += len(data)
            yield "item", {"offset": offset, "data": data}
        elif ended or not request.follow:
            yield "end", {"offset": offset}
            return
        else:
            await kernel.growth.wait(proc.pid, LOOK_S)
