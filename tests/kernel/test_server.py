"""The socket: whatever one client does, the others are served."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import struct

import msgpack
import pytest

from llmos.kernel import protocol as p
from llmos.kernel.wire import MAX_FRAME_BYTES, Unpacker, pack
from support.live import Live, in_kernel, wait_until

GARBAGE = {
    "a length above the limit": struct.pack(">I", MAX_FRAME_BYTES + 1),
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a frame that is not MessagePack": struct.pack(">I", 3) + b"\xc1\xc1\xc1",
    "a frame with bytes left over": struct.pack(">I", 2) + b"\x01\x02",
}

NO_REQUEST = {
    "a number": 7,
    "a list": [1, 2],
    "no id": {"call": "ping"},
    "an id that is a text": {"id": "x", "call": "ping"},
    "an id that is a list": {"id": [], "call": "ping"},
    "no call": {"id": 1},
    "a call that is a number": {"id": 1, "call": 5},
    "args that are a list": {"id": 1, "call": "ping", "args": []},
    "cancel of nothing": {"id": 12345, "cancel": True},
    "cancel of a list": {"id": [], "cancel": True},
}


async def connect(live: Live) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_unix_connection(str(live.kernel.home.socket))


async def read_frame(reader: asyncio.StreamReader) -> dict[str, object]:
    unpacker = Unpacker()
    async with asyncio.timeout(5):
        while True:
            for message in unpacker.feed(await reader.readexactly(1)):
                found: dict[str, object] = message
                return found


def goodbye(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_is_answered_with_an_error_and_the_line_is_cut(live: Live, what: str) -> None:
    async def go() -> None:
        reader, writer = await connect(live)
        writer.write(GARBAGE[what])
        answer = await read_frame(reader)
        assert isinstance(answer["error"], dict)
        assert answer["error"]["code"] == "protocol-error"
        async with asyncio.timeout(5):
            assert await reader.read() == b"", "the line is still open"
        goodbye(writer)
        assert await live.ask(p.Ping()) is None

    live.run(go())


@pytest.mark.parametrize("what", NO_REQUEST)
def test_a_message_that_is_no_request_does_not_end_the_line(live: Live, what: str) -> None:
    async def go() -> None:
        reader, writer = await connect(live)
        writer.write(pack(NO_REQUEST[what]) + pack({"id": 77, "call": "ping"}))
        answers = [await read_frame(reader)]
        while answers[-1].get("id") != 77:
            assert "error" in answers[-1]
            answers.append(await read_frame(reader))
        assert answers[-1] == {"id": 77, "ok": None}
        goodbye(writer)

    live.run(go())


@in_kernel
async def test_half_a_frame_and_then_nothing_hurts_nobody(live: Live) -> None:
    reader, writer = await connect(live)
    frame = pack({"id": 1, "call": "ping"})
    writer.write(frame[:5])
    assert await live.ask(p.Ping()) is None
    writer.write(frame[5:])
    assert await read_frame(reader) == {"id": 1, "ok": None}
    writer.write(frame[:3])
    goodbye(writer)
    assert await live.ask(p.Ping()) is None


@in_kernel
async def test_bytes_one_by_one_are_still_a_request(live: Live) -> None:
    reader, writer = await connect(live)
    for byte in pack({"id": 9, "call": "ping"}):
        writer.write(bytes([byte]))
        await writer.drain()
    assert await read_frame(reader) == {"id": 9, "ok": None}
    goodbye(writer)


@in_kernel
async def test_a_client_that_does_not_read_stops_nobody_and_is_not_buffered_for_ever(
    live: Live,
) -> None:
    reader, writer = await connect(live)
    reader._transport.pause_reading()  # type: ignore[attr-defined]
    for number in range(1000):
        writer.write(pack({"id": number, "call": "programs"}))
    await wait_until(lambda: any(not c._drained.is_set() for c in live.kernel.clients))
    (slow,) = (c for c in live.kernel.clients if not c._drained.is_set())
    for _ in range(100):
        assert await live.ask(p.Ping()) is None
    one = len(pack({"id": 1, "ok": live.kernel.manifest}))
    # It was cut off at the high-water mark, give or take what was read in one piece.
    assert slow._transport.get_write_buffer_size() < 1000 * one / 2
    reader._transport.resume_reading()  # type: ignore[attr-defined]
    seen: list[int] = []
    unpacker = Unpacker()
    async with asyncio.timeout(20):
        while len(seen) < 1000:
            seen += [m["id"] for m in unpacker.feed(await reader.read(1 << 18))]
    assert sorted(seen) == list(range(1000))
    goodbye(writer)


@in_kernel
async def test_a_slow_reader_of_a_stream_slows_neither_the_process_nor_the_others(
    live: Live,
) -> None:
    pid = await live.spin(steps=3000, busy_ms=0)
    reader, writer = await connect(live)
    reader._transport.pause_reading()  # type: ignore[attr-defined]
    writer.write(pack(p.encode(p.Attach(pid), 1)))
    items, answer = await live.talk.collect(p.Attach(pid))
    assert len(items) == 3000
    assert answer["exit_status"] == 0
    goodbye(writer)


@in_kernel
async def test_an_answer_above_the_frame_limit_is_an_error_not_the_end(live: Live) -> None:
    pid = await live.spin(steps=1)
    await live.wait(pid)
    live.proc(pid).result["text"] = "x" * (MAX_FRAME_BYTES + 1)
    try:
        for request in (p.Wait(pid), p.Ps(pid=pid)):
            number = live.talk.begin(request)
            message = await live.talk.next_message(number)
            assert message["error"]["code"] == "protocol-error"
        assert await live.ask(p.Ping()) is None
    finally:
        live.proc(pid).result.clear()


@in_kernel
async def test_more_open_requests_than_the_limit_wait_their_turn(live: Live) -> None:
    pid = await live.spin(steps=100_000)
    async with await live.other() as talk:
        numbers = [talk.begin(p.Wait(pid)) for _ in range(600)]
        assert await live.ask(p.Ping()) is None
        await live.ask(p.Kill(pid))
        for number in numbers:
            assert (await talk.answer(number))["exit_status"] == 143
        assert await talk.ask(p.Ping()) is None


@in_kernel
async def test_clients_that_come_and_go_leave_nothing(live: Live) -> None:
    pid = await live.spin(steps=100_000)
    before = len(live.kernel.clients)
    for _ in range(50):
        async with await live.other() as talk:
            talk.begin(p.Attach(pid))
            talk.begin(p.Wait(pid))
            await talk.ask(p.Ping())
    await wait_until(lambda: len(live.kernel.clients) == before)


@in_kernel
async def test_the_socket_is_the_owners_alone(live: Live) -> None:
    assert stat.S_IMODE(os.stat(live.kernel.home.socket).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(live.path).st_mode) == 0o700


@in_kernel
async def test_a_peer_of_another_user_is_not_let_in(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its credentials come from the system; here the kernel takes itself for somebody else."""
    real = os.getuid()
    monkeypatch.setattr("llmos.kernel.access.os.getuid", lambda: real + 1)
    reader, writer = await connect(live)
    writer.write(msgpack.packb(1))
    async with asyncio.timeout(5):
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
    monkeypatch.undo()
    goodbye(writer)
    assert await live.ask(p.Ping()) is None
