"""`ps`: the process table."""

from __future__ import annotations

from typing import Any

from llmos.kernel import protocol
from llmos.kernel.connection import Connection
from llmos.kernel.kernel import Kernel


def handle(kernel: Kernel, request: protocol.Ps, client: Connection) -> list[dict[str, Any]]:
    table = kernel.core.m.procs
    if request.pid:
        return [kernel.shown(kernel.core.m.find(request.pid), client)]
    return [kernel.shown(p, client) for _, p in sorted(table.items()) if request.all or p.live]
