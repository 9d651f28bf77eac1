"""Seen by strace: what was acknowledged was synced before its answer was sent.

Every system call of the kernel's threads that matters is recorded with its time: each answer to a
submit (the bytes name its pid) comes after a sync of the journal that itself comes after the row
was written.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest

from support.real import Machine

STRACE = shutil.which("strace")
SUBMITS = 20
# pid time name(...) ... = result; with -y a descriptor is shown as 7</path>.
CALL = re.compile(r"^(\d+)\s+(\d+\.\d+) (\w+)\((\d+)<([^>]*)>(.*)$")
RESUMED = re.compile(r"^(\d+)\s+(\d+\.\d+) <\.\.\. (\w+) resumed>(.*)$")


def may_trace() -> bool:
    if STRACE is None:
        return False
    done = subprocess.run([STRACE, "-o", os.devnull, "true"], capture_output=True, check=False)
    return done.returncode == 0


pytestmark = pytest.mark.skipif(not may_trace(), reason="strace is not there, or not allowed")


@pytest.fixture
def m() -> Iterator[Machine]:
    made = Machine("--device", "sim0:memory=1GiB")
    try:
        made.boot()
        yield made
        made.shutdown()
        made.check_nobody_is_left()
    finally:
        made.dispose()


def trace(m: Machine, out: Path) -> subprocess.Popen[bytes]:
    assert m.process is not None
    calls = "trace=write,pwrite64,sendto,sendmsg,fsync,fdatasync"
    tracer = subprocess.Popen(
        [str(STRACE), "-f", "-y", "-xx", "-s", "70000", "-ttt", "-e", calls, "-o", str(out),
         "-p", str(m.process.pid)],
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert tracer.stderr is not None
    assert b"attached" in tracer.stderr.readline()
    return tracer


def events(text: str) -> list[tuple[str, str, bytes]]:
    """("write" | "synced" | "sent", path, bytes) in their order; a sync counts when it is done."""
    found: list[tuple[str, str, bytes]] = []
    syncing: dict[str, str] = {}
    for line in text.splitlines():
        resumed = RESUMED.match(line)
        if resumed and "sync" in resumed[3] and resumed[1] in syncing:
            assert resumed[4].rstrip().endswith("= 0"), line
            found.append(("synced", syncing.pop(resumed[1]), b""))
        call = CALL.match(line)
        if call is None:
            continue
        thread, _, name, _, path, rest = call.groups()
        path = bytes.fromhex(path.replace("\\x", "")).decode() if "\\x" in path else path
        if "sync" in name:
            if "unfinished" in rest:
                syncing[thread] = path
            else:
                assert rest.rstrip().endswith("= 0"), line
                found.append(("synced", path, b""))
            continue
        data = re.search(r'"((?:\\x[0-9a-f]{2})*)"', rest)
        content = bytes.fromhex(data[1].replace("\\x", "")) if data else b""
        found.append(("sent" if "socket" in path or "unix" in path.lower() else "write",
                      path, content))  # fmt: skip
    return found


def test_each_acknowledged_submit_was_synced_before_its_answer(m: Machine, tmp_path: Path) -> None:
    m.submit(steps=1, memory_bytes=2**30)  # everything is warm, and the device is taken
    out = tmp_path / "trace"
    tracer = trace(m, out)
    pids = [m.submit(steps=1, memory_bytes=2**30, exit_status=7) for _ in range(SUBMITS)]
    tracer.terminate()
    tracer.communicate()
    seen = events(out.read_text())
    wal = str(m.home / "journal.db-wal")
    for pid in pids:
        answer = b"\xa3pid" + packed(pid)
        sent = next(n for n, (what, _, data) in enumerate(seen) if what == "sent"
                    and answer in data and b"ok" in data)  # fmt: skip
        written = [n for n, (what, path, data) in enumerate(seen) if what == "write"
                   and path == wal and answer in data and b"exit_status\x07" in data]  # fmt: skip
        assert written, f"the row of process {pid} is not in the log"
        synced = [n for n, (what, path, _) in enumerate(seen) if what == "synced"
                  and path == wal and written[0] < n < sent]  # fmt: skip
        assert synced, f"process {pid}: written at {written[0]}, answered at {sent}, not synced"
    syncs = sum(what == "synced" and path == wal for what, path, _ in seen)
    assert syncs <= 4 * SUBMITS


def packed(pid: int) -> bytes:
    return bytes(msgpack.packb(pid))
