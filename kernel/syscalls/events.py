"""`events`: the kernel's own record of its decisions."""

from __future__ import annotations

from typing import Any

from llmos.kernel import access, protocol
from llmos.kernel.connection import Connection
from llmos.kernel.kernel import Kernel


def handle(kernel: Kernel, request: protocol.Events, client: Connection) -> list[dict[str, Any]]:
    found = [r for r in kernel.dmesg.lines if r["seq"] > request.since]
    if access.is_admin(client.uid):
        return found
    # What happens to others is seen; why may say what they work on.
    mine = kernel.core.m.by_user.get(client.uid, {})
    return [r if r["pid"] in mine else {**r, "why": ""} for r in found]
