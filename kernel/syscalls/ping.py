"""`ping`: answer at once."""

from __future__ import annotations

from llmos.kernel import protocol
from llmos.kernel.kernel import Kernel
from llmos.kernel.connection import Connection


def handle(kernel: Kernel, request: protocol.Ping, client: Connection) -> None:
    return None
