"""Limits of a client and of a user: each is said at the limit, and costs the others nothing."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmos.kernel import protocol as p
from llmos.kernel import server, streams
from llmos.kernel.errors import BadArgument, Busy, NoMemory
from llmos.kernel.wire import MAX_FRAME_BYTES, Unpacker, pack
from support.live import Live, in_kernel, wait_until


@pytest.fixture
def limits(live: Live) -> Iterator[Callable[..., None]]:
    """Changes limits of the running kernel for one test."""
    before = live.kernel.config

    def change(**values: Any) -> None:
        live.kernel.config = dataclasses.replace(live.kernel.config, **values)

    yield change
    live.kernel.config = before


async def connect(live: Live) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_unix_connection(str(live.kernel.home.socket))


async def read_all(reader: asyncio.StreamReader) -> list[dict[str, object]]:
    unpacker, found = Unpacker(), []
    async with asyncio.timeout(10):
        while data := await reader.read(1 << 16):
            found += list(unpacker.feed(data))
    return found


@in_kernel
async def test_one_connection_too_many_is_told_so_and_closed(
    live: Live, limits: Callable[..., None]
) -> None:
    limits(max_clients=len(live.kernel.clients) + 1)
    async with await live.other() as second:
        reader, writer = await connect(live)
        (answer,) = await read_all(reader)
        assert answer["error"]["code"] == "busy"  # type: ignore[index]
        assert "max_clients" in answer["error"]["hint"]  # type: ignore[index]
        writer.transport.abort()
        assert await second.ask(p.Ping()) is None
        assert await live.ask(p.Ping()) is None


@in_kernel
async def test_one_process_too_many_is_refused(live: Live, limits: Callable[..., None]) -> None:
    await live.ask(p.Services())  # its own processes have all begun
    mine = live.kernel.core.m.by_user[os.getuid()]
    limits(max_processes=len(mine) + 1)
    pid = await live.spin(steps=100_000)
    with pytest.raises(Busy, match="processes that have not ended"):
        await live.spin()
    await live.ask(p.Kill(pid))
    assert (await live.wait(await live.spin(steps=1)))["exit_status"] == 0


@in_kernel
async def test_halves_of_messages_are_kept_up_to_a_bound_and_the_oldest_goes(live: Live) -> None:
    half = struct.pack(">I", MAX_FRAME_BYTES) + bytes(MAX_FRAME_BYTES // 2)
    many = live.kernel.config.max_unfinished // len(half) + 2
    lines = []
    for _ in range(many):
        reader, writer = await connect(live)
        writer.write(half)
        await writer.drain()
        lines.append((reader, writer))
        assert await live.ask(p.Ping()) is None
    (first,) = await read_all(lines[0][0])
    assert "max_unfinished" in first["error"]["hint"]  # type: ignore[index]
    kept = sum(len(c._unpacker) for c in live.kernel.clients)
    assert kept <= live.kernel.config.max_unfinished
    for _, writer in lines:
        writer.transport.abort()
    await wait_until(lambda: not any(len(c._unpacker) for c in live.kernel.clients))
    intake = next(iter(live.kernel.clients))._intake
    await wait_until(lambda: intake._total == 0)


@in_kernel
async def test_ten_thousand_requests_in_one_piece_are_answered_in_turns(live: Live) -> None:
    """Also those whose answers are large: they are not made before the client has read others."""
    pid = await live.spin(steps=1)
    await live.wait(pid)
    live.proc(pid).result["text"] = "x" * 100_000
    reader, writer = await connect(live)
    reader._transport.pause_reading()  # type: ignore[attr-defined]
    flood = b"".join(pack({"id": n, "call": "ps", "args": {"pid": pid}}) for n in range(10_000))
    writer.write(flood)
    await wait_until(lambda: any(not c._drained.is_set() for c in live.kernel.clients))
    (slow,) = (c for c in live.kernel.clients if not c._drained.is_set())
    for _ in range(20):
        assert await live.ask(p.Ping()) is None
    most = live.kernel.config.client_buffer + server.BURST * 101_000
    assert slow._transport.get_write_buffer_size() < most
    assert len(slow._unpacker) < 1 << 20, "what it sent waits in its socket"
    reader._transport.resume_reading()  # type: ignore[attr-defined]
    seen, unpacker = 0, Unpacker()
    async with asyncio.timeout(60):
        while seen < 2000:
            seen += sum(1 for _ in unpacker.feed(await reader.read(1 << 20)))
    writer.transport.abort()
    live.proc(pid).result.clear()


@in_kernel
async def test_an_id_that_is_open_is_not_given_twice(live: Live) -> None:
    pid = await live.spin(steps=100_000)
    reader, writer = await connect(live)
    for _ in range(3):
        writer.write(pack({"id": 5, "call": "wait", "args": {"pid": pid}}))
    unpacker = Unpacker()
    found: list[Any] = []
    async with asyncio.timeout(10):
        while len(found) < 2:
            found += list(unpacker.feed(await reader.read(1 << 16)))
    assert all("take another id" in m["error"]["message"] for m in found)
    writer.transport.abort()
    mine = [t for t in asyncio.all_tasks() if "_await" in repr(t.get_coro())]
    await wait_until(lambda: all(t.done() for t in mine))


@in_kernel
async def test_a_name_that_would_fill_every_ps_is_refused(live: Live) -> None:
    with pytest.raises(BadArgument, match="at most 200"):
        await live.submit("spin", name="x" * 201)


def test_a_quota_is_explained_with_when_it_ends(fresh: Live) -> None:
    async def go() -> None:
        (fresh.path / "config.toml").write_text("")
        await fresh.boot()
        m = fresh.kernel.core.m
        m.settings = dataclasses.replace(m.settings, user_device_s=0.3, user_memory=0.5)
        pid = await fresh.spin(steps=100_000, busy_ms=1)
        await fresh.until(pid, lambda proc: proc.reason == "quota")
        told = await fresh.ask(p.Explain(pid))
        assert any("device-seconds in the last 24 h; it goes on in" in a for a in told["advice"])
        with pytest.raises(NoMemory, match=r"one user may have 0\.5 GiB of sim0"):
            await fresh.spin(memory_bytes=600 << 20)
        fresh.kernel.planner.save()
        assert (fresh.path / "usage.json").exists()
        m.settings = dataclasses.replace(m.settings, user_device_s=0.0)
        await fresh.down()

    fresh.run(go())


# ---- logs ----


def test_a_log_is_trimmed_from_its_beginning_and_keeps_its_offsets(tmp_path: Path) -> None:
    path = tmp_path / "log"
    lines = b"".join(b"%07d\n" % n for n in range(100_000))
    path.write_bytes(lines)
    assert streams.trim(path, 1 << 20) == 0
    assert streams.trim(path, 100_000) > 600_000
    assert path.stat().st_blocks * 512 < 110_000
    goes_on = streams.first_data(path, 0)
    assert 0 < goes_on <= len(lines) - 50_000
    assert streams.read_bytes(path, goes_on, len(lines)) == lines[goes_on:]
    assert streams.first_data(path, len(lines)) == len(lines)
    assert streams.first_data(path, len(lines) + 1) == 0, "it began anew"
    with path.open("ab") as log:
        log.write(b"more\n")
    assert streams.read_bytes(path, streams.tail_offset(path, 1)) == b"more\n"


@in_kernel
async def test_a_reader_hears_that_the_beginning_is_gone(live: Live) -> None:
    pid = await live.spin(steps=1)
    await live.wait(pid)
    log = live.kernel.home.work(pid) / "log"
    log.write_bytes(b"old line\n" * 100_000)
    assert streams.trim(log, 64 << 10)
    items, end = await live.talk.collect(p.Logs(pid))
    data = b"".join(i["data"] for i in items)
    assert data.startswith(b"[the log is kept to")
    assert data.endswith(b"old line\n")
    assert len(data) < 70_000
    assert end["offset"] == 900_000


@pytest.mark.parametrize("what", ["a link", "a link twice", "a pipe", "a folder"])
def test_what_is_not_a_plain_file_of_its_own_is_not_read_and_not_changed(
    tmp_path: Path, what: str
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    secret = other / "secret"
    secret.write_bytes(b"x" * 100_000)
    path = tmp_path / "log"
    match what:
        case "a link":
            path.symlink_to(secret)
        case "a link twice":
            path.hardlink_to(secret)
        case "a pipe":
            os.mkfifo(path)
        case "a folder":
            path.mkdir()
    assert streams.read_bytes(path, 0) == b""
    assert streams.tail_offset(path, 5) == 0
    assert streams.trim(path, 4096) == 0
    assert secret.read_bytes() == b"x" * 100_000
