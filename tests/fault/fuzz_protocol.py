"""Send a million bad frames at a real kernel; others must not notice, and nothing may be left.

    python tests/fault/fuzz_protocol.py [--frames 1000000] [--clients 2] [--seed 1]

Prints what was sent, the null call of another client before, beside generators that send nothing,
and under fire, and the kernel's memory and descriptors. Exits 1 when the kernel died, leaked or
logged a bug, or let the other client wait more than twice as long (99th percentile). Latencies are
compared on the same busy machine: generators take as much of it.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing as mp
import os
import socket
import sys
import time
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from llmos.kernel import protocol as p
from llmos.kernel.errors import ProtocolError
from llmos.kernel.wire import Unpacker, pack
from support.frames import Frames
from support.real import Machine, wait_until

# How many times longer the 99th percentile of the others may be than beside idle generators.
MOST_RATIO = 2.0

# Frames on one connection, at most; then a call that must be answered, and a new connection.
BATCH = 100
LAST_ID = 1 << 50
LIMIT_S = 60.0


@dataclass
class Figures:
    frames: int
    seconds: float
    idle_ms: tuple[float, float]  # the null call's median and 99th percentile
    beside_ms: tuple[float, float]
    under_fire_ms: tuple[float, float]
    memory_bytes: tuple[int, int]
    descriptors: tuple[int, int]
    log: str

    @property
    def p99_ratio(self) -> float:
        return self.under_fire_ms[1] / self.beside_ms[1]


def send_batch(path: str, frames: Frames, count: int, dry: bool = False) -> int:
    """Send up to `count` frames on one connection -> how many. Ends with a ping and its answer,
    or with the line being cut."""
    sent, data, cut = 0, [], False
    while sent < count and not cut:
        frame, cut = frames.next()
        data.append(frame)
        sent += 1
    if dry:
        return sent
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(LIMIT_S)
        line.connect(path)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            line.sendall(b"".join(data))
            if not cut:
                line.sendall(pack({"id": LAST_ID, "call": "ping"}))
            else:
                line.shutdown(socket.SHUT_WR)
            unpacker = Unpacker()
            while got := line.recv(1 << 18):
                if any(isinstance(m, dict) and m.get("id") == LAST_ID for m in unpacker.feed(got)):
                    break
    return sent


def attack(path: str, seed: int, count: int, dry: bool, stop: Event, done: Any) -> None:
    frames, sent = Frames(seed), 0
    while sent < count and not stop.is_set():
        n = send_batch(path, frames, min(BATCH, count - sent), dry)
        sent += n
        with done.get_lock():
            done.value += n


class Pinger:
    """Another client, which wants nothing but an answer."""

    def __init__(self, path: str) -> None:
        self._line = socket.socket(socket.AF_UNIX)
        self._line.settimeout(LIMIT_S)
        self._line.connect(path)
        self._frame = pack(p.encode(p.Ping(), 1))
        self._answer = len(pack({"id": 1, "ok": None}))

    def times(self, seconds: float) -> list[float]:
        found = []
        end = time.perf_counter() + seconds
        while (began := time.perf_counter()) < end:
            self._line.sendall(self._frame)
            assert len(self._line.recv(self._answer)) == self._answer
            found.append(time.perf_counter() - began)
        return found

    def close(self) -> None:
        self._line.close()


def summary(times: list[float]) -> tuple[float, float]:
    times = sorted(times)
    return times[len(times) // 2] * 1e3, times[len(times) * 99 // 100] * 1e3


def rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def fuzz(count: int, clients: int, seed: int) -> Figures:
    machine = Machine("--device", "sim0:memory=1GiB")
    try:
        machine.boot()
        assert machine.process is not None
        pid, path = machine.process.pid, str(machine.home / "kernel.sock")
        wait_until(lambda: machine.ask(p.Services()), "the services to be up")
        pinger = Pinger(path)
        idle = summary(pinger.times(3.0))
        # A first round fills what is filled once: caches, the allocator, the log's buffers.
        warm = Frames(seed - 1)
        for _ in range(50):
            send_batch(path, warm, BATCH)
        _, beside, _, _ = _fire(pinger, path, seed, 1 << 60, clients, dry=True, at_most_s=8.0)
        before = rss(pid), descriptors(pid)
        sent, under, seconds, ended = _fire(pinger, path, seed, count // clients, clients)
        wait_until(lambda: len(machine.ask(p.Status()) or ()) > 0, "an answer after it")
        wait_until(lambda: machine.ask(p.Status())["clients"] <= 2, "all clients to be gone")
        with contextlib.suppress(AssertionError):  # the figures say it
            wait_until(lambda: descriptors(pid) <= before[1], "descriptors to be closed", 5.0)
        after = rss(pid), descriptors(pid)
        assert ended, "an attacker died"
        pinger.close()
        log = machine.log()
        machine.shutdown()
        machine.check_nobody_is_left()
    finally:
        machine.dispose()
    return Figures(sent, seconds, idle, beside, under, (before[0], after[0]),
                   (before[1], after[1]), log)  # fmt: skip


def _fire(
    pinger: Pinger, path: str, seed: int, each: int, clients: int, dry: bool = False,
    at_most_s: float = 1e9,
) -> tuple[int, tuple[float, float], float, bool]:  # fmt: skip
    context = mp.get_context("fork")
    done, stop = context.Value("q", 0), context.Event()
    attackers = [
        context.Process(target=attack, args=(path, seed + n, each, dry, stop, done))
        for n in range(clients)
    ]
    began = time.monotonic()
    for attacker in attackers:
        attacker.start()
    times: list[float] = []
    while any(a.is_alive() for a in attackers) and time.monotonic() - began < at_most_s:
        times += pinger.times(0.2)
    stop.set()
    for attacker in attackers:
        attacker.join()
    seconds = time.monotonic() - began
    return done.value, summary(times), seconds, all(a.exitcode == 0 for a in attackers)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    f = fuzz(options.frames, options.clients, options.seed)
    grown = f.memory_bytes[1] - f.memory_bytes[0]
    print(f"{f.frames:,} frames in {f.seconds:.0f} s ({f.frames / f.seconds:,.0f}/s)")
    for what, (median, p99) in (
        ("idle", f.idle_ms), ("beside generators", f.beside_ms), ("under fire", f.under_fire_ms),
    ):  # fmt: skip
        print(f"null call, {what}: median {median:.3f} ms, p99 {p99:.3f} ms")
    print(
        f"p99 under fire: {f.p99_ratio:.2f} times that beside generators (at most {MOST_RATIO:g})"
    )
    print(f"memory {f.memory_bytes[0] / 2**20:.1f} -> {f.memory_bytes[1] / 2**20:.1f} MiB "
          f"({grown / f.frames:.2f} bytes a frame)")  # fmt: skip
    print(f"descriptors {f.descriptors[0]} -> {f.descriptors[1]}")
    print(f"kernel.log: {len(f.log)} bytes{': ' + f.log[-500:] if f.log.strip() else ''}")
    leaked = f.descriptors[1] > f.descriptors[0] or grown > 32 << 20
    return int("Traceback" in f.log or leaked or f.p99_ratio > MOST_RATIO)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except ProtocolError as exc:
        raise SystemExit(f"the kernel sent what is no frame: {exc}") from None
