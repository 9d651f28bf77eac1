"""`renice`: change class, nice value or deadline of a process, while it waits or runs."""

from __future__ import annotations

from typing import Any

from llmos.kernel import events as ev
from llmos.kernel import protocol
from llmos.kernel.connection import Connection
from llmos.kernel.errors import BadArgument
from llmos.kernel.kernel import Kernel


async def handle(kernel: Kernel, request: protocol.Renice, client: Connection) -> dict[str, Any]:
    at = deadline_at(kernel, request.deadline_s)
    kernel.post(ev.ReniceAsked(request.pid, request.nice, request.cls, at))
    await kernel.journal.flushed()
    proc = kernel.core.m.find(request.pid)
    return {"pid": proc.pid, "nice": proc.nice, "class": proc.cls.word,
            "deadline_at": proc.deadline_at}  # fmt: skip


def deadline_at(kernel: Kernel, deadline_s: float | None) -> float | None:
    """The moment of a deadline that is given from now on; 0 stays 0. Raises BadArgument."""
    if deadline_s is None or deadline_s == 0:
        return deadline_s
    if not 0 < deadline_s < float("inf"):
        raise BadArgument(
            f"a deadline is a time from now on, not {deadline_s:g} s", "write 30m, 2h or 3600"
        )
    return kernel.now() + deadline_s
