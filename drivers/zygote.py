"""The kernel's end of a zygote: start or adopt one, have it fork workers and plans."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmos.drivers.worker.zygote import EXIT_OTHER, THREAD_VARIABLES
from llmos.kernel.wire import Unpacker, pack

# Importing torch, transformers and peft takes 3-5 s on a warm machine, 10 s on a cold one.
START_LIMIT_S = 120.0


# How long the zygote of an earlier kernel, which is still loading, is waited for at a time.
OTHER_S = 0.3

# How long an OpenMP thread spins before it sleeps, in loop turns (some tens of microseconds). The
# default, 300,000, is right for a process that is alone on its cores: with a neighbour, even
# one that only now and then runs, each barrier burns a time slice and a training falls to a
# tenth (docs/design/log.md). This costs 0-8 % alone and keeps a third when crowded.
SPIN_COUNT = "10000"

# glibc's malloc without thread caches and fast bins: small pieces that they keep lie between freed
# tensors, and up to every fourth byte of a training was such a hole. Steps are as fast without.
MALLOC = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """That of the zygote, and so of all workers: what their libraries read when they load."""
    made = {"GOMP_SPINCOUNT": SPIN_COUNT, **given, **dict.fromkeys(THREAD_VARIABLES, "1")}
    # A later setting of the same name wins: that of whoever set one.
    theirs = given.get("GLIBC_TUNABLES")
    made["GLIBC_TUNABLES"] = f"{MALLOC}:{theirs}" if theirs else MALLOC
    # Whoever asks at import whether there is a GPU must not initialise CUDA: it cannot be
    # forked afterwards.
    made["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    return made


class Zygote(asyncio.Protocol):
    """`told` gets forked, failed, exited and planned. Orders wait until it is ready.

    When it dies before it has answered an order, the next one gets it.
    """

    def __init__(
        self, home: Path, told: Callable[[dict[str, Any]], None], name: str = "zygote"
    ) -> None:
        self.path = home / f"{name}.sock"
        self.log = home / f"{name}.log"
        self.state = "starting"
        self.os_pid = 0
        self._told = told
        self._unpacker = Unpacker()
        self._transport: asyncio.Transport | None = None
        # Orders without an answer yet, and which zygote (os_pid) has them; 0: none.
        self._open: dict[tuple[str, Any], tuple[bytes, int]] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._pidfd = -1

    def open(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._come_up())

    async def close(self) -> None:
        """End the zygote; its workers are gone by now, or become orphans of the kernel."""
        self._closing = True
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._transport is not None:
            self._transport.write(pack({"k": "end"}))
            self._transport.close()
        if self._process is not None:
            if self.state != "ready":
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5):
                    await self._process.wait()
        self.state = "ended"

    def send(self, message: dict[str, Any]) -> None:
        """Order a `fork` or a `plan`."""
        self._open[_key(message)] = (pack(message), 0)
        if self.state == "ready":
            self._hand_over()
        elif self.state == "failed":
            self.state = "starting"
            self.open()

    def _hand_over(self) -> None:
        if self._transport is None:
            return
        for key, (frame, owner) in self._open.items():
            if owner != self.os_pid:
                self._transport.write(frame)
                self._open[key] = (frame, self.os_pid)

    async def _come_up(self) -> None:
        """Dial the zygote of an earlier kernel, else start one and dial that."""
        if await self._dial():
            return
        await self._start()
        pause, waited = 0.01, 0.0
        while not await self._dial():
            ended = self._process.returncode if self._process is not None else None
            if ended == EXIT_OTHER:
                # One that an earlier kernel started is loading: it will listen, or end.
                await asyncio.sleep(OTHER_S)
                await self._start()
            elif ended is not None:
                self._fail(f"see {self.log}")
                return
            if waited > START_LIMIT_S:
                self._fail(f"it did not start in {START_LIMIT_S:.0f} s")
                return
            await asyncio.sleep(pause)
            waited, pause = waited + pause, min(pause * 1.5, 0.05)

    def _fail(self, why: str) -> None:
        self.state = "failed"
        self._open.clear()
        self._told({"k": "down", "why": why})

    async def _dial(self) -> bool:
        loop = asyncio.get_running_loop()
        try:
            await loop.create_unix_connection(lambda: self, str(self.path))
        except OSError:
            return False
        # One that is just dying still lets in, for a moment.
        return self._transport is not None

    async def _start(self) -> None:
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "llmos.drivers.worker.zygote", str(self.path),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment(os.environ),
                start_new_session=True, cwd="/",
            )  # fmt: skip
        self.os_pid = self._process.pid

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        for message in self._unpacker.feed(data):
            if message["k"] == "ready":
                self.state, self.os_pid = "ready", message["os_pid"]
                self._pidfd = _pidfd_of(self.os_pid)
                self._hand_over()
            elif message["k"] != "exited":
                self._open.pop(_key(message), None)
            self._told(message)

    def _await_end(self, pidfd: int) -> None:
        """Tell that it is gone when the system has told its children so: its line breaks before."""

        def gone() -> None:
            if pidfd >= 0:
                loop.remove_reader(pidfd)
                os.close(pidfd)
            self._told({"k": "gone"})

        loop = asyncio.get_running_loop()
        if pidfd < 0:
            gone()
        else:
            loop.add_reader(pidfd, gone)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._unpacker = Unpacker()
        if self._closing or self.state == "failed":
            return
        # It died. Its workers live on and are the kernel's children now (it is their
        # subreaper); the next fork needs a new one.
        self._await_end(self._pidfd)
        self._pidfd = -1
        self.state = "starting"
        if self._task is None or self._task.done():
            self.open()


def _pidfd_of(os_pid: int) -> int:
    try:
        return os.pidfd_open(os_pid)
    except ProcessLookupError:
        return -1


def _key(message: dict[str, Any]) -> tuple[str, Any]:
    """What an order and its answer have in common."""
    if "ticket" in message:
        return "plan", message["ticket"]
    return "fork", message["worker_id"]
