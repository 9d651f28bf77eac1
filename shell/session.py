"""The client's side of the protocol, pure: requests in, bytes out; bytes in, answers out.

Knows no socket, no clock and no event loop: the blocking and the asyncio client share it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmos.kernel import protocol
from llmos.kernel.errors import LlmosError, ProtocolError, from_wire
from llmos.kernel.wire import Unpacker, pack


@dataclass(frozen=True, slots=True)
class Item:
    """One element of a stream; more follow."""

    value: Any


@dataclass(frozen=True, slots=True)
class Result:
    """The call has ended well."""

    value: Any


@dataclass(frozen=True, slots=True)
class Failure:
    """The call has ended with an error."""

    error: LlmosError


Answer = Item | Result | Failure


class Session:
    """One connection: gives each request an id and each answer back to its id."""

    def __init__(self) -> None:
        self._unpacker = Unpacker()
        self._last_id = 0
        self._open: set[int] = set()

    def send(self, request: protocol.Request) -> tuple[int, bytes]:
        """The id of the request and the bytes to write."""
        self._last_id += 1
        data = pack(protocol.encode(request, self._last_id))
        self._open.add(self._last_id)
        return self._last_id, data

    def cancel(self, request_id: int) -> bytes:
        """The bytes that end a stream early; answers that are under way to it are dropped."""
        self._open.discard(request_id)
        return pack({"id": request_id, "cancel": True})

    def bye(self) -> bytes:
        """The last bytes of a client that goes on purpose: what is attached to it ends at once."""
        return pack({"id": 0, "bye": True})

    def receive(self, data: bytes) -> list[tuple[int, Answer]]:
        """The answers that `data` completes, in order. Raises ProtocolError."""
        answers = [_answer(message) for message in self._unpacker.feed(data)]
        known = [(i, a) for i, a in answers if i in self._open]
        self._open -= {i for i, a in known if not isinstance(a, Item)}
        return known


def _answer(message: Any) -> tuple[int, Answer]:
    if not isinstance(message, dict):
        raise ProtocolError("the kernel's answer is not a map")
    request_id = message.get("id")
    if not isinstance(request_id, int) or request_id < 0:
        # An error that belongs to no request: the kernel could not read what was sent.
        if isinstance(message.get("error"), dict):
            raise from_wire(message["error"])
        raise ProtocolError("the kernel's answer has no integer `id`")
    if "item" in message:
        return request_id, Item(message["item"])
    if "ok" in message:
        return request_id, Result(message["ok"])
    if isinstance(message.get("error"), dict):
        return request_id, Failure(from_wire(message["error"]))
    raise ProtocolError("the kernel's answer is neither ok, item nor error")
