"""Submits a second that are on the disk when they are answered, beside what the disk can do.

    python tests/bench/bench_journal.py [--seconds 5] [--folder DIR] [--profile]

submit, known      processes of a remembered profile that wait for memory; 1 and 32 clients
submit, planned    each with another size, so that each is planned by a forked child
SQLite, grouped    one thread that commits whatever has come in, as the journal does
raw fsync          a file, 2,000 bytes appended, fdatasync; one after the other

All on the same folder, in one run. `--profile` prints where the kernel's own time goes.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import os
import platform
import pstats
import queue
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from llmos.kernel import protocol as p
from llmos.kernel.wire import Unpacker, pack

GIB = 2**30


def quantiles(samples_s: list[float]) -> str:
    ordered = sorted(samples_s)
    p50, p99 = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)]
    return f"p50 {p50 * 1e3:7.2f} ms   p99 {p99 * 1e3:7.2f} ms"


class Submitter(asyncio.Protocol):
    """A client in a closed loop: the next submit when the last is answered."""

    def __init__(self, end: float, args: Any, samples: list[float], done: Any) -> None:
        self.end, self.args, self.samples, self.done = end, args, samples, done
        self.unpacker, self.number = Unpacker(), 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.send()

    def send(self) -> None:
        self.number += 1
        request = p.Submit("spin", self.args())
        self.began = time.perf_counter()
        self.transport.write(pack(p.encode(request, self.number)))

    def data_received(self, data: bytes) -> None:
        for message in self.unpacker.feed(data):
            if "error" in message and not self.done.done():
                self.done.set_exception(RuntimeError(message["error"]["message"]))
            now = time.perf_counter()
            self.samples.append(now - self.began)
            if now > self.end:
                self.transport.close()
                if not self.done.done():
                    self.done.set_result(None)
                return
            self.send()


async def submits(path: str, clients: int, seconds: float, args: Any) -> list[float]:
    loop, samples, waiting = asyncio.get_running_loop(), [], []
    end = time.perf_counter() + seconds
    for _ in range(clients):
        done: asyncio.Future[None] = loop.create_future()
        waiting.append(done)
        await loop.create_unix_connection(lambda d=done: Submitter(end, args, samples, d), path)
    await asyncio.gather(*waiting)
    return samples


def sqlite_loop(folder: Path, waiters: int, seconds: float) -> list[float]:
    """What group commit costs without anything around it: rows of 2,000 bytes."""
    asked: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def write() -> None:
        db = sqlite3.connect(folder / "peer.db", isolation_level=None)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute("CREATE TABLE IF NOT EXISTS t (pid INTEGER PRIMARY KEY, ended REAL, row BLOB)")
        while (first := asked.get()) is not None:
            batch = [first]
            while not asked.empty():
                batch.append(asked.get())
            db.execute("BEGIN IMMEDIATE")
            db.executemany("INSERT INTO t (row) VALUES (?)", [(bytes(2000),)] * len(batch))
            db.execute("COMMIT")
            for one in batch:
                one.set()
        db.close()

    writer = threading.Thread(target=write)
    writer.start()
    samples: list[float] = []
    end = time.perf_counter() + seconds

    def wait() -> None:
        while time.perf_counter() < end:
            began, done = time.perf_counter(), threading.Event()
            asked.put(done)
            done.wait()
            samples.append(time.perf_counter() - began)

    threads = [threading.Thread(target=wait) for _ in range(waiters)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asked.put(None)
    writer.join()
    return samples


def fsync_loop(folder: Path, seconds: float) -> list[float]:
    samples, end = [], time.perf_counter() + seconds
    with (folder / "raw").open("ab", buffering=0) as f:
        while time.perf_counter() < end:
            began = time.perf_counter()
            f.write(bytes(2000))
            os.fdatasync(f.fileno())
            samples.append(time.perf_counter() - began)
    return samples


def cpu_s(os_pid: int) -> float:
    """What a process has had of the CPUs, all its threads."""
    fields = Path(f"/proc/{os_pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def phase(
    what: str, kernel: subprocess.Popen[bytes], path: str, clients: int, seconds: float,
    args: Any, note: str = "",
) -> None:  # fmt: skip
    """Submit for so long; print the rate, and what each cost the kernel: that says more than the
    rate where others use the machine."""
    before = cpu_s(kernel.pid)
    found = asyncio.run(submits(path, clients, seconds, args))
    each = f"kernel {(cpu_s(kernel.pid) - before) / len(found) * 1e3:.2f} ms of CPU each"
    show(f"submit, {what}, {clients} client(s)", found, seconds, f"{each} {note}".strip())


def show(what: str, samples: list[float], seconds: float, note: str = "") -> None:
    print(f"{what:34s} {len(samples) / seconds:8.0f}/s   {quantiles(samples)}   {note}")


def serve(home: str, profile: str) -> int:
    """The kernel, in this process, under cProfile."""
    from llmos.kernel import main

    sys.argv = ["llmos-kernel", "--home", home, "--device", "sim0:memory=8GiB"]
    profiler = cProfile.Profile()
    status = profiler.runcall(main.main)
    profiler.dump_stats(profile)
    return int(status)


def start_kernel(home: Path, profile: Path | None, *device: str) -> subprocess.Popen[bytes]:
    (home / "config.toml").write_text("max_processes = 1_000_000\n")
    command = [sys.executable, "-P", "-m", "llmos.kernel.main", "--home", str(home), *device]
    if profile is not None:
        command = [sys.executable, __file__, "--serve", str(home), str(profile)]
    kernel = subprocess.Popen(command)
    while not (home / "kernel.sock").exists():
        time.sleep(0.05)
        assert kernel.poll() is None, "the kernel ended"
    return kernel


def kernel_part(folder: Path, seconds: float, profile: Path | None) -> None:
    home = Path(tempfile.mkdtemp(prefix="lb", dir=folder))
    kernel = start_kernel(home, profile, "--device", "sim0:memory=8GiB")
    path = str(home / "kernel.sock")
    numbers = iter(range(1, 10**9))
    whole = {"steps": 10**9, "memory_bytes": 8 * GIB - 2**21}

    def known() -> dict[str, Any]:
        return whole

    def planned() -> dict[str, Any]:
        return {**whole, "memory_bytes": 8 * GIB - 2**21 - 4096 * next(numbers) % 2**20}

    try:
        asyncio.run(submits(path, 1, 0.2, known))  # takes the device; the profile is known now
        for clients in (1, 32):
            phase("known", kernel, path, clients, seconds, known, "(target 1,000/s)")
        for clients in (1, 32):
            phase("planned (sim)", kernel, path, clients, seconds, planned)
    finally:
        kernel.terminate()
        kernel.wait()
        shutil.rmtree(home)
    if profile is not None:
        pstats.Stats(str(profile)).sort_stats("tottime").print_stats(35)


def planned_part(folder: Path, seconds: float) -> None:
    """On the real CPU driver: a plan is a child that the zygote forks."""
    home = Path(tempfile.mkdtemp(prefix="lb", dir=folder))
    kernel = start_kernel(home, None, "--device", "cpu0:memory=1GiB")
    path = str(home / "kernel.sock")
    numbers = iter(range(1, 10**9))

    def planned() -> dict[str, Any]:
        return {"steps": 10**9, "memory_bytes": 600 * 2**20 + 4096 * next(numbers)}

    try:
        asyncio.run(submits(path, 1, 0.1, planned))  # waits for the zygote
        for clients in (1, 32):
            phase("planned", kernel, path, clients, seconds, planned)
    finally:
        kernel.terminate()
        kernel.wait()
        shutil.rmtree(home)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--folder", type=Path, default=Path("/tmp"))
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--serve", nargs=2)
    given = parser.parse_args()
    if given.serve:
        raise SystemExit(serve(*given.serve))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
          f"SQLite {sqlite3.sqlite_version}, {given.folder}")  # fmt: skip
    folder = Path(tempfile.mkdtemp(prefix="peers", dir=given.folder))
    try:
        show("raw fdatasync", fsync_loop(folder, given.seconds), given.seconds)
        for waiters in (1, 32):
            found = sqlite_loop(folder, waiters, given.seconds)
            show(f"SQLite, grouped, {waiters} waiter(s)", found, given.seconds)
    finally:
        shutil.rmtree(folder)
    profile = Path(tempfile.mktemp(suffix=".prof")) if given.profile else None
    kernel_part(given.folder, given.seconds, profile)
    if not given.profile:
        planned_part(given.folder, given.seconds)


if __name__ == "__main__":
    main()
