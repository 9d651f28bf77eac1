"""`events`: the kernel's own record of its decisions."""

from __future__ import annotations

from typing import Any

from llmos.kernel import protocol
from llmos.kernel.connection import Connection
from llmos.kernel.kernel import Kernel


def handle(kernel: Kernel, request: protocol.Events, client: Connection) -> list[dict[str, Any]]:
    return [r for r in kernel.records if r["seq"] > request.since]
