"""Calls of a program to services: asked over the line, answered by the kernel."""

from __future__ import annotations

import queue
from typing import Any

from llmos.drivers.worker.gate import Gate
from llmos.drivers.worker.link import Link
from llmos.kernel.errors import TimedOut, from_wire

# How long a service may take to answer, in seconds that the worker is not held for: it waits in
# pieces, and a hold, however long, costs no more than the piece it falls into.
CALL_S = 120.0
CALL_PIECE_S = 1.0


class Calling:
    def __init__(self, link: Link, gate: Gate, later: list[dict[str, Any]]) -> None:
        """`later` gets what else comes while it waits."""
        self._link, self._gate, self._later = link, gate, later
        self._calls = 0

    def call(self, method: str, arguments: dict[str, Any]) -> Any:
        """The answer of a service. Raises LlmosError."""
        self._calls += 1
        number = self._calls
        self._link.post({"k": "call", "id": number, "method": method, "args": arguments}, keep=True)
        pieces = round(CALL_S / CALL_PIECE_S)
        while True:
            try:
                with self._gate.away():
                    message = self._link.inbox.get(timeout=CALL_PIECE_S)
            except queue.Empty:
                pieces -= 1
                if not pieces:
                    raise TimedOut(f"{method}: no answer in {CALL_S:.0f} s") from None
                continue
            if message["k"] == "answer" and message["id"] == number:
                if "error" in message:
                    raise from_wire(message["error"])
                return message.get("ok")
            self._later.append(message)
