"""The kernel's own costs, beside what they are compared with, in one run.

    python tests/bench/bench_kernel.py [--seconds 3] [--starts 15]

boot:      `llmos boot` until the socket answers; the kernel's private memory
null call: the round trip of a `ping` with 1 and 32 clients, beside a raw blocking echo
start:     submit of a trivial program until its first step, beside a fresh interpreter that
           imports torch and transformers
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from llmos.kernel.wire import Unpacker, pack
from llmos.shell import Client

PING = pack({"id": 1, "call": "ping", "args": {}})


def quantiles(samples_s: list[float]) -> str:
    ordered = sorted(samples_s)
    p50, p99 = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)]
    return f"p50 {p50 * 1e6:7.0f} us   p99 {p99 * 1e6:7.0f} us"


def boot(home: Path) -> float:
    began = time.perf_counter()
    subprocess.run([shutil.which("llmos") or "llmos", "boot"], check=True, capture_output=True,
                   env={**os.environ, "LLMOS_HOME": str(home)})  # fmt: skip
    return time.perf_counter() - began


def echo_server(path: str) -> None:
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen()
    connection, _ = server.accept()
    while data := connection.recv(4096):
        connection.sendall(data)


def round_trips(path: str, seconds: float, whole: Callable[[bytes], bool]) -> list[float]:
    """One blocking client, closed loop."""
    client = socket.socket(socket.AF_UNIX)
    client.connect(path)
    samples, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        client.sendall(PING)
        while not whole(client.recv(4096)):
            pass
        samples.append(time.perf_counter() - began)
    client.close()
    return samples


class Pinger(asyncio.Protocol):
    def __init__(self, end: float, samples: list[float], done: asyncio.Future[None]) -> None:
        self.end, self.samples, self.done = end, samples, done
        self.unpacker = Unpacker()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.send()

    def send(self) -> None:
        self.began = time.perf_counter()
        self.transport.write(PING)

    def data_received(self, data: bytes) -> None:
        for _ in self.unpacker.feed(data):
            now = time.perf_counter()
            self.samples.append(now - self.began)
            if now > self.end:
                self.transport.close()
                if not self.done.done():
                    self.done.set_result(None)
                return
            self.send()


async def many(path: str, clients: int, seconds: float) -> list[float]:
    loop, samples, waiting = asyncio.get_running_loop(), [], []
    end = time.perf_counter() + seconds
    for _ in range(clients):
        done: asyncio.Future[None] = loop.create_future()
        waiting.append(done)
        await loop.create_unix_connection(lambda d=done: Pinger(end, samples, d), path)
    await asyncio.gather(*waiting)
    return samples


def calls(home: Path, seconds: float) -> None:
    path = str(home / "echo.sock")
    server = subprocess.Popen([sys.executable, __file__, "--echo", path])
    while not os.path.exists(path):
        time.sleep(0.01)
    raw = round_trips(path, seconds, lambda d: len(d) > 0)
    server.wait(timeout=10)
    unpacker = Unpacker()
    kernel = round_trips(
        str(home / "kernel.sock"), seconds, lambda d: any(True for _ in unpacker.feed(d))
    )
    ratio = statistics.median(kernel) / statistics.median(raw)
    print(f"raw blocking echo       1 client   {quantiles(raw)}   {len(raw) / seconds:8.0f}/s")
    print(f"llmos null call         1 client   {quantiles(kernel)}   {len(kernel) / seconds:8.0f}/s"
          f"   {ratio:.2f} x the echo (target 2.2)")  # fmt: skip
    lots = asyncio.run(many(str(home / "kernel.sock"), 32, seconds))
    print(f"llmos null call        32 clients  {quantiles(lots)}   {len(lots) / seconds:8.0f}/s"
          "   (target 30,000/s)")  # fmt: skip


def start_of_a_process(home: Path, starts: int) -> None:
    samples = []
    with Client(home) as client:
        client.wait(client.submit("spin", {"steps": 1, "busy_ms": 0.0}))  # the zygote is warm now
        for _ in range(starts):
            began = time.perf_counter()
            pid = client.submit("spin", {"steps": 1, "busy_ms": 0.0})
            next(client.attach(pid))
            samples.append(time.perf_counter() - began)
            client.wait(pid)
    fresh = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch, transformers"], check=True)
        fresh.append(time.perf_counter() - began)
    ours, theirs = statistics.median(samples), statistics.median(fresh)
    worst = max(samples) * 1e3
    print(f"submit to first step    {ours * 1e3:6.1f} ms median, {worst:.1f} ms worst of {starts}"
          " (target 60)")  # fmt: skip
    print(
        f"python -c 'import torch, transformers'   {theirs * 1e3:6.0f} ms   ({theirs / ours:.0f} x)"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--starts", type=int, default=15)
    parser.add_argument("--echo")
    given = parser.parse_args()
    if given.echo:
        threading.Thread(target=echo_server, args=(given.echo,)).start()
        return
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python "
          f"{platform.python_version()}, msgpack {metadata.version('msgpack')}")  # fmt: skip
    folder = Path(tempfile.mkdtemp(prefix="llmos-", dir="/tmp"))
    times = []
    try:
        for _ in range(5):
            times.append(boot(folder))
            with Client(folder) as client:
                os_pid = client.status()["kernel"]["os_pid"]
                client.programs()
            rss = Path(f"/proc/{os_pid}/status").read_text().split("VmRSS:")[1].split()[0]
            if len(times) < 5:
                subprocess.run(["llmos", "shutdown"], check=True, capture_output=True,
                               env={**os.environ, "LLMOS_HOME": str(folder)})  # fmt: skip
        median, mib = statistics.median(times) * 1e3, int(rss) / 1024
        print(f"boot to a served socket {median:.0f} ms median of 5, first {times[0] * 1e3:.0f} ms "
              f"(target 300); kernel RSS {mib:.0f} MiB (target 60)")  # fmt: skip
        calls(folder, given.seconds)
        start_of_a_process(folder, given.starts)
    finally:
        with Client(folder) as client:
            client.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
