"""The host of one service: an OS process that serves the service's calls to the kernel.

    python -P -m llmos.services.host FD HOME NAME MODULE:CLASS

FD is one end of a socket pair whose other end is the kernel's; when the kernel goes, so does
the host (services keep what they know on disk). One call at a time, in the order they came.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

from llmos.kernel.errors import LlmosError, ServiceFailed
from llmos.kernel.wire import Unpacker, pack
from llmos.services.base import Service, describe, invoke


def serve(connection: socket.socket, service: Service) -> None:
    """Answer calls until the other end closes."""
    unpacker = Unpacker()
    while data := connection.recv(1 << 16):
        for message in unpacker.feed(data):
            if message["k"] == "call":
                connection.sendall(
                    pack({"k": "answer", "id": message["id"], **answer(service, message)})
                )


def answer(service: Service, message: dict[str, Any]) -> dict[str, Any]:
    """One call -> {"ok": value} or {"error": ...}; what cannot be packed is an error too."""
    name = f"{service.name}.{message['method']}"
    try:
        reply = {"ok": invoke(service, message["method"], message["args"])}
        pack(reply)
    except LlmosError as exc:
        return {"error": exc.to_wire()}
    except Exception as exc:  # noqa: BLE001  whatever a service raises is its caller's answer
        traceback.print_exc()
        text = f"{name} raised {type(exc).__name__}: {exc}".splitlines()[0]
        hint = f"`llmos service logs {service.name}` has the whole story"
        return {"error": ServiceFailed(text, hint).to_wire()}
    return reply


def main() -> int:
    number, home, name, entry = sys.argv[1:5]
    connection = socket.socket(fileno=int(number))
    module, _, attribute = entry.partition(":")
    cls = getattr(importlib.import_module(module), attribute)
    service = cls(Path(home))
    hello = {"k": "hello", "proto": 1, "worker_id": name, "os_pid": os.getpid(), "loaded": True}
    connection.sendall(pack(hello))
    connection.sendall(pack({"k": "loaded", "describe": describe(cls)}))
    try:
        serve(connection, service)
    finally:
        service.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
