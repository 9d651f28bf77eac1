"""`send`: input for a process that takes some."""

from __future__ import annotations

from typing import Any

from llmos.kernel import events as ev
from llmos.kernel import protocol
from llmos.kernel.connection import Connection
from llmos.kernel.kernel import Kernel


def handle(kernel: Kernel, request: protocol.Send, client: Connection) -> dict[str, Any]:
    kernel.post(ev.InputGiven(request.pid, request.message))
    return {"pid": request.pid}
