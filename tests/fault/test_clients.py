"""Clients that behave badly, at a kernel in an OS process of its own: the others go on being
answered, and its memory stays within a bound."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmos.kernel import protocol as p
from llmos.kernel.wire import MAX_FRAME_BYTES, pack
from support.real import Machine, machine, wait_until

pytestmark = pytest.mark.fault

# What twenty bad clients of a kind may cost: the bound on unfinished messages, buffers of a
# megabyte and a burst each, and what the allocator keeps.
MOST_BYTES = 160 << 20


@pytest.fixture(scope="module")
def m() -> Iterator[Machine]:
    with machine("--device", "sim0:memory=1GiB") as made:
        made.ask(p.Services())
        pid = made.submit(steps=3000, busy_ms=0)
        made.end_of(pid)
        yield made


def garbage(line: socket.socket) -> None:
    line.sendall(os.urandom(100_000))


def half_a_frame(line: socket.socket) -> None:
    line.sendall(struct.pack(">I", MAX_FRAME_BYTES) + bytes(MAX_FRAME_BYTES - 1))


def ten_thousand_requests(line: socket.socket) -> None:
    line.sendall(b"".join(pack({"id": n, "call": "programs"}) for n in range(10_000)))


def streams_that_nobody_reads(line: socket.socket) -> None:
    for number in range(200):
        line.sendall(pack(p.encode(p.Attach(2), number)))


def records_that_nobody_reads(line: socket.socket) -> None:
    line.sendall(b"".join(pack({"id": n, "call": "events"}) for n in range(1000)))


@pytest.mark.parametrize(
    "misbehave",
    [garbage, half_a_frame, ten_thousand_requests, streams_that_nobody_reads,
     records_that_nobody_reads],
)  # fmt: skip
def test_a_bad_client_costs_the_others_nothing(
    m: Machine, misbehave: Callable[[socket.socket], None]
) -> None:
    assert m.process is not None
    statm = Path(f"/proc/{m.process.pid}/statm")

    def rss() -> int:
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before, most = rss(), 0
    with contextlib.ExitStack() as lines:
        for _ in range(20):
            line = lines.enter_context(socket.socket(socket.AF_UNIX))
            line.settimeout(0.05)  # it may be that the kernel takes no more of it
            line.connect(str(m.home / "kernel.sock"))
            with contextlib.suppress(OSError):
                misbehave(line)
            for _ in range(5):
                assert m.ask(p.Ping()) is None
            most = max(most, rss())
        for _ in range(100):  # they stay, and read nothing
            assert m.ask(p.Ping()) is None
        most = max(most, rss())
    assert most - before < MOST_BYTES
    wait_until(lambda: m.ask(p.Status())["clients"] == 1, "the bad clients to be forgotten")
    assert "Traceback" not in m.log()


@pytest.mark.long
def test_a_worker_that_floods_its_log_fills_no_disk() -> None:
    made = Machine("--device", "cpu0:memory=2GiB")
    (made.home / "config.toml").write_text('log_size = "1MiB"\n')
    try:
        made.boot()
        command = ["/bin/sh", "-c", "yes flood | head -c 60000000; sleep 3600"]
        pid = made.submit(
            "exec", command=command, memory="64MiB", cwd="/", env={"PATH": os.defpath}
        )
        log = made.home / "procs" / str(pid) / "log"
        wait_until(lambda: log.exists() and log.stat().st_size == 60_000_000, "the flood to end")
        wait_until(lambda: log.stat().st_blocks * 512 <= 2 << 20, "the log to be trimmed")
        items, end = made.collect(p.Logs(pid))
        data = b"".join(i["data"] for i in items)
        assert data.startswith(b"[the log is kept to 1,048,576 bytes")
        assert data.endswith(b"flood\n")
        assert end["offset"] == 60_000_000
        assert [e for e in made.ask(p.Events()) if e["what"] == "log-trimmed" and e["pid"] == pid]
        made.ask(p.Kill(pid, 9))
        made.shutdown()
    finally:
        made.dispose()
