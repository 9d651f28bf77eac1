"""`programs`: the manifest, as soon as it is made."""

from __future__ import annotations

from typing import Any

from llmos.kernel import protocol
from llmos.kernel.connection import Connection
from llmos.kernel.kernel import Kernel


async def handle(kernel: Kernel, request: protocol.Programs, client: Connection) -> dict[str, Any]:
    await kernel.installed.ready.wait()
    if request.checked:
        await kernel.installed.checked.wait()
    return kernel.manifest
