"""Bytes that no good client sends, and some that a good one does: seeded, so that each can be
sent again. Requests that would end the kernel, or fill it with processes, are not among them."""

from __future__ import annotations

import dataclasses
import random
import struct
from typing import Any

from llmos.kernel import protocol
from llmos.kernel.wire import MAX_FRAME_BYTES, pack

_HEADER = struct.Struct(">I")
_NAMES = [name for name in protocol.REQUESTS if name != "shutdown"]
_SCALARS: list[Any] = [
    None, True, False, 0, -1, 1, 2, 19, 255, 2**31, 2**62, 2**63 - 1, -(2**63), 2**64 - 1, 0.0,
    -0.0, 1e308, float("nan"), float("inf"), float("-inf"), "", "x", "\0", "\ud7ff", "ü" * 50,
    "../../etc/shadow", "/etc/shadow", "a" * 5000, b"", b"\xff" * 20, [], {}, [[]], [{}],
]  # fmt: skip


class Frames:
    """`next()` gives (bytes, whether the line is to be cut after them)."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._kinds = [
            (30, self._wrong_fields), (20, self._mutated), (15, self._no_request),
            (10, self._random_body), (10, self._deep), (5, self._valid), (4, self._bits),
            (3, self._raw), (2, self._long), (1, self._half),
        ]  # fmt: skip

    def next(self) -> tuple[bytes, bool]:
        weights = [weight for weight, _ in self._kinds]
        _, make = self._random.choices(self._kinds, weights)[0]
        return make()

    def _value(self, depth: int = 0) -> Any:
        r = self._random
        if depth < 3 and r.random() < 0.2:
            return [self._value(depth + 1) for _ in range(r.randrange(4))]
        if depth < 3 and r.random() < 0.2:
            return {r.choice(["a", "pid", "", 1, -1]): self._value(depth + 1) for _ in range(3)}
        return r.choice(_SCALARS)

    def _request(self, name: str) -> dict[str, Any]:
        fields = [f.name for f in dataclasses.fields(protocol.REQUESTS[name])]
        chosen = self._random.sample(fields, self._random.randrange(len(fields) + 1))
        args = {field: self._value() for field in chosen}
        if name == "submit":  # never one that could be taken
            args["program"] = self._random.choice(["", "no-such", 5, None])
        if name == "services":
            args["action"] = self._random.choice(["ls", "restart", 3])
            args["name"] = "no-such"
        return {"id": self._random.randrange(1, 1 << 40), "call": name, "args": args}

    def _wrong_fields(self) -> tuple[bytes, bool]:
        return pack(self._request(self._random.choice(_NAMES))), False

    def _mutated(self) -> tuple[bytes, bool]:
        """A request with one thing of its frame's own shape changed."""
        request = self._request(self._random.choice(_NAMES))
        request[self._random.choice(["id", "args", "call", "cancel", "more"])] = self._value()
        if request.get("call") == "shutdown":
            request["call"] = "ping"
        return pack(request), False

    def _no_request(self) -> tuple[bytes, bool]:
        return pack(self._value()), False

    def _random_body(self) -> tuple[bytes, bool]:
        body = self._random.randbytes(self._random.randrange(1, 60))
        return _HEADER.pack(len(body)) + body, True

    def _deep(self) -> tuple[bytes, bool]:
        depth = self._random.choice([31, 33, 100, 500, 1000, 1100, 5000])
        kind = self._random.choice([b"\x91", b"\x81\xa1a"])
        body = kind * depth + b"\xc0"
        if self._random.random() < 0.5:
            body = b"\x83\xa2id\x01\xa4call\xa4ping\xa4args" + body
        return _HEADER.pack(len(body)) + body, depth > 500

    def _valid(self) -> tuple[bytes, bool]:
        name = self._random.choice(["ping", "status", "ps", "mem", "programs", "events", "explain"])
        args = {"pid": 1} if name == "explain" else {}
        number = self._random.randrange(1, 1 << 40)
        return pack({"id": number, "call": name, "args": args}), False

    def _bits(self) -> tuple[bytes, bool]:
        """A good frame with some bits the other way."""
        frame = bytearray(pack(self._request(self._random.choice(_NAMES))))
        for _ in range(self._random.randrange(1, 5)):
            frame[self._random.randrange(4, len(frame))] ^= 1 << self._random.randrange(8)
        return bytes(frame), True

    def _raw(self) -> tuple[bytes, bool]:
        return self._random.randbytes(self._random.randrange(1, 200)), True

    def _long(self) -> tuple[bytes, bool]:
        size = self._random.choice([MAX_FRAME_BYTES + 1, 2**31, 2**32 - 1])
        return _HEADER.pack(size) + b"\x81", True

    def _half(self) -> tuple[bytes, bool]:
        frame = pack(self._request(self._random.choice(_NAMES)))
        return frame[: self._random.randrange(1, len(frame))], True
