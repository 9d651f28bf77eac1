"""`ping`: answer at once."""

from __future__ import annotations

from llmos.kernel import protocol
from llmos.kernel.connection import Connection
from llmos.kernel.kernel import Kernel


def handle(kernel: Kernel, request: protocol.Ping, client: Connection) -> None:
    return None
