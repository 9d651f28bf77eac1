"""Frames: a 4-byte big-endian length, then one MessagePack value of that many bytes.

Every socket of llmos speaks them: clients and kernel, kernel and zygote, kernel and
workers, kernel and services. Knows nothing about what is inside.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

import msgpack

from llmos.kernel.errors import ProtocolError

# A prompt of a million tokens fits; a frame that claims more is refused unread.
MAX_FRAME_BYTES = 16 * 1024 * 1024

_HEADER = struct.Struct(">I")
_packb = msgpack.packb
_unpackb = msgpack.unpackb


def pack(value: Any) -> bytes:
    """One frame, header included. Raises ProtocolError above MAX_FRAME_BYTES."""
    body = _packb(value, use_bin_type=True)
    if len(body) > MAX_FRAME_BYTES:
        raise ProtocolError(f"a message of {len(body):,} bytes is above {MAX_FRAME_BYTES:,}")
    return bytes(_HEADER.pack(len(body)) + body)


def packer() -> Callable[[Any], bytes]:
    """A `pack` that is twice as fast, for one thread: it keeps its buffer between calls."""
    to_bytes = msgpack.Packer(use_bin_type=True).pack
    header = _HEADER.pack

    def fast(value: Any) -> bytes:
        body: bytes = to_bytes(value)
        if len(body) > MAX_FRAME_BYTES:
            raise ProtocolError(f"a message of {len(body):,} bytes is above {MAX_FRAME_BYTES:,}")
        return header(len(body)) + body

    return fast


def unpack(body: bytes | memoryview) -> Any:
    """The value of one frame without its header; ProtocolError when it is not MessagePack."""
    try:
        return _unpackb(body, raw=False, strict_map_key=False)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as exc:
        why = str(exc) or type(exc).__name__  # a map with a list as its key; too deep
        raise ProtocolError(f"a frame is not MessagePack ({why})"[:300]) from None


# What `pop` gives when no frame is complete: None is a value.
NOTHING: Any = object()


class Unpacker:
    """Bytes as they arrive in, values out. Keeps at most one unfinished frame."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    def __len__(self) -> int:
        """Bytes that were pushed and not yet popped."""
        return len(self._buffer)

    def push(self, data: bytes) -> None:
        """Take bytes, to be popped value by value: for who may not take all of them at once."""
        self._buffer += data

    def pop(self) -> Any:
        """The next value, or NOTHING. Raises ProtocolError on a bad frame."""
        if len(self._buffer) < 4:
            return NOTHING
        end = 4 + self._size(self._buffer, 0)
        if len(self._buffer) < end:
            return NOTHING
        body = bytes(self._buffer[4:end])
        del self._buffer[:end]
        return unpack(body)

    def feed(self, data: bytes) -> Iterator[Any]:
        """Yield each value that `data` completes. Raises ProtocolError on a bad frame."""
        # The common case, without a copy: the data is exactly one frame.
        if not self._buffer and len(data) >= 4 and len(data) == 4 + self._size(data, 0):
            yield unpack(memoryview(data)[4:])
            return
        self._buffer += data
        at = 0
        while len(self._buffer) - at >= 4:
            size = self._size(self._buffer, at)
            if len(self._buffer) - at - 4 < size:
                break
            body = bytes(self._buffer[at + 4 : at + 4 + size])
            at += 4 + size
            yield unpack(body)
        del self._buffer[:at]

    @staticmethod
    def _size(data: bytes | bytearray, at: int) -> int:
        (size,) = _HEADER.unpack_from(data, at)
        if size > MAX_FRAME_BYTES:
            raise ProtocolError(f"a frame claims {size:,} bytes; the limit is {MAX_FRAME_BYTES:,}")
        return int(size)
