"""What HTTP costs: the same requests through the gateway and through the Python client, in one run.

    python tests/bench/bench_gateway.py MODEL_FOLDER [--clients 1 8 32] [--seconds 5] [--tokens 32]
        [--transformers]

Closed loops of so many clients, greedy, every request the same; the ways take turns, round by
round, on one kernel. `added` is the median request through the gateway less that through the
client. `health` is a request that makes no process: what the HTTP server alone takes.
`--transformers`: the same requests to `transformers serve --continuous-batching`, if it is there.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llmos.shell import AsyncClient, Client
from support.machine import end, make_machine

PROMPT = "Once upon a time"
ROUNDS = 3


@dataclass
class Timed:
    """What one way took."""

    whole_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    spent_s: float = 0.0
    cpu_s: float = 0.0  # of the gateway's server

    def line(self) -> str:
        p50, p99 = quantile(self.whole_s, 0.5), quantile(self.whole_s, 0.99)
        cpu_ms = self.cpu_s / len(self.whole_s) * 1e3
        return (f"{len(self.whole_s) / self.spent_s:7.1f} requests/s  p50 {p50:7.1f} ms  "
                f"p99 {p99:7.1f} ms  first token p50 {quantile(self.first_s, 0.5):7.1f} ms  "
                f"gateway cpu {cpu_ms:6.2f} ms")  # fmt: skip


def quantile(seconds: list[float], q: float) -> float:
    """In milliseconds; NaN of none."""
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] * 1e3 if ordered else float("nan")


# One request -> when its first token came, or None.
Ask = Callable[[], Awaitable[float | None]]


async def closed_loop(clients: list[Ask], seconds: float, timed: Timed) -> None:
    began = time.perf_counter()

    async def one(ask: Ask) -> None:
        while time.perf_counter() < began + seconds:
            at = time.perf_counter()
            first = await ask()
            timed.whole_s.append(time.perf_counter() - at)
            if first is not None:
                timed.first_s.append(first - at)

    await asyncio.gather(*map(one, clients))
    timed.spent_s += time.perf_counter() - began


class Http:
    """One connection that is kept: as little client as there can be."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def __aenter__(self) -> Http:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> float | None:
        data = json.dumps(body).encode() if body is not None else b""
        self._writer.write(
            f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        assert head.startswith(b"http/1.1 200"), head
        if b"content-length: " in head:
            length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
            await self._reader.readexactly(length)
            return None
        first = None
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            await self._reader.readexactly(size + 2)
            first = first or time.perf_counter()
        await self._reader.readexactly(2)
        return first


async def by_client(llmos: AsyncClient, model: str, tokens: int) -> float | None:
    args = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0,
            "ignore_eos": True, "raw": True}  # fmt: skip
    pid = await llmos.submit("infer", args, attached=True)
    first = None
    async for record in llmos.attach(pid):
        if record["kind"] == "text" and first is None:
            first = time.perf_counter()
    return first


@contextlib.asynccontextmanager
async def connections(port: int, count: int) -> AsyncIterator[list[Http]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(Http(port)) for _ in range(count)]


async def compare(
    home: Path, ports: dict[str, int], model: str, count: int, args: argparse.Namespace
) -> None:
    body = {"model": model, "prompt": PROMPT, "max_tokens": args.tokens, "temperature": 0,
            "ignore_eos": True}  # fmt: skip
    ways: dict[str, Callable[[Http], Ask]] = {
        "gateway, streamed": lambda h: (
            lambda: h.ask("POST", "/v1/completions", {**body, "stream": True})
        ),
        "gateway, whole": lambda h: lambda: h.ask("POST", "/v1/completions", body),
        "gateway, health": lambda h: lambda: h.ask("GET", "/health"),
    }
    timed = {name: Timed() for name in ("client", *ways)}
    async with AsyncClient(home) as llmos, connections(ports["llmos"], count) as lines:
        asks: dict[str, list[Ask]] = {name: [way(h) for h in lines] for name, way in ways.items()}
        asks["client"] = [lambda: by_client(llmos, model, args.tokens)] * count
        for name in timed:  # warm
            await closed_loop(asks[name], 0.1, Timed())
        for _ in range(ROUNDS):
            for name, one in timed.items():
                before = cpu_s(ports["os_pid"])
                await closed_loop(asks[name], args.seconds / ROUNDS, one)
                one.cpu_s += cpu_s(ports["os_pid"]) - before
    print(f"\n{count} clients, {args.tokens} tokens each")
    for name, one in timed.items():
        print(f"  {name:18s} {one.line()}", flush=True)
    base = statistics.median(timed["client"].whole_s)
    for name in ("gateway, streamed", "gateway, whole"):
        added = (statistics.median(timed[name].whole_s) - base) * 1e3
        print(f"  {name:18s} added {added:6.2f} ms ({added / base / 10:.1f} %)")
    if "transformers" in ports:
        await transformers_round(ports["transformers"], count, args)


async def transformers_round(port: int, count: int, args: argparse.Namespace) -> None:
    body = {"model": str(args.model), "messages": [{"role": "user", "content": PROMPT}],
            "max_tokens": args.tokens, "temperature": 0, "stream": True}  # fmt: skip
    timed = Timed()
    async with connections(port, count) as lines:
        asks: list[Ask] = [
            lambda h=h: h.ask("POST", "/v1/chat/completions", body)  # type: ignore[misc]
            for h in lines
        ]
        await closed_loop(asks, 0.1, Timed())
        await closed_loop(asks, args.seconds, timed)
    print(f"  {'transformers serve':18s} {timed.line()}", flush=True)


@contextlib.contextmanager
def transformers_serve() -> Iterator[int]:
    """`transformers serve`, until it answers -> its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", "--port", str(port),
               "--continuous-batching", "--log-level", "error"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 180
            while True:
                assert process.poll() is None, "it has ended"
                assert time.monotonic() < deadline, "it does not answer"
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.1)
            yield port
        finally:
            process.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--transformers", action="store_true")
    args = parser.parse_args()
    machine = make_machine()
    try:
        (machine.home / "models").mkdir()
        os.symlink(args.model.absolute(), machine.home / "models" / args.model.name)
        machine.ok("boot")
        machine.ok("serve", "-d", "--port", "0")
        status = machine.json("serve", "status")
        port = int(status["url"].rsplit(":", 1)[1][:-3])
        ports = {"llmos": port, "os_pid": int(status["os_pid"])}
        with Client(machine.home) as llmos:
            "".join(llmos.run(args.model.name, PROMPT, max_tokens=2))  # loads the model
        with contextlib.ExitStack() as stack:
            if args.transformers:
                ports["transformers"] = stack.enter_context(transformers_serve())
            for count in args.clients:
                asyncio.run(compare(machine.home, ports, args.model.name, count, args))
        print(f"\nmemory of the gateway: {private_mib(ports['os_pid']):.0f} MiB private")
    finally:
        end(machine)


def cpu_s(os_pid: int) -> float:
    fields = Path(f"/proc/{os_pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def private_mib(os_pid: int) -> float:
    text = Path(f"/proc/{os_pid}/smaps_rollup").read_text()
    return sum(int(line.split()[1]) for line in text.splitlines()
               if line.startswith("Private_")) / 1024  # fmt: skip


if __name__ == "__main__":
    main()
