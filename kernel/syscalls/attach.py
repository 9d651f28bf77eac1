"""`attach`: stream a process's records, from any offset, to its end."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from llmos.kernel import access, protocol
from llmos.kernel.connection import Connection
from llmos.kernel.errors import BadArgument
from llmos.kernel.kernel import Kernel
from llmos.kernel.streams import StreamReader
from llmos.kernel.syscalls.wait import outcome


async def handle(
    kernel: Kernel, request: protocol.Attach, client: Connection
) -> AsyncGenerator[tuple[str, Any], None]:
    if request.offset < 0:
        raise BadArgument(f"offset is 0 or more, not {request.offset}")
    if request.pid not in kernel.core.m.procs:
        await kernel.adoption.over.wait()  # an engine may know it
        access.check(kernel, request, client)
    proc = kernel.core.m.find(request.pid)
    if request.own and proc.attached and access.is_own(client, proc):
        kernel.owners.back(proc.pid)
        client.attached.add(proc.pid)
    if request.at_end:
        await kernel.changed(proc.pid, lambda p: not p.live, None)
    reader, offset = StreamReader(kernel.home.work(proc.pid) / "stream"), request.offset
    try:
        while True:
            # Asked before reading: what is written after the read is seen in the next round.
            ended = not proc.live
            records, offset = reader.read(offset)
            for after, record in records:
                yield "item", {"offset": after, "record": record}
            if records:
                continue
            if not request.follow:
                yield "end", {"offset": offset}
                return
            if ended:
                yield "end", outcome(proc)
                return
            await kernel.growth.wait(proc.pid)
            kernel.core.m.find(proc.pid)  # a process that was refused is not there any more
    finally:
        reader.close()
