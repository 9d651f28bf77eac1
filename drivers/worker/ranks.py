"""The ranks of a worker that spans several devices: one OS process a device, one session for all.

Rank 0 is the worker as everybody knows it: it alone talks to the kernel. The others are forked
from it before it has a thread, and each has a line to it (a socket pair). Rank 0 says what is to
be done, everyone does it, and what ranks tell each other of a step goes by torch.distributed.

Nobody waits for anybody with a clock. A hold may last for hours and stops all ranks alike, so a
rank that is late is no fault; one that is dead is noticed by the end of its line. When rank 0
dies, the system kills the others.

From rank 0: load, restore, step, save (frames of kernel/wire.py); the end of the line is the end.
To rank 0: saved, failed (reason, result, sure).
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from llmos.drivers.worker import memory
from llmos.drivers.worker.gate import Gate
from llmos.drivers.worker.programs import build_args, load_program, make_ready
from llmos.drivers.worker.words import Where, last_words
from llmos.kernel.wire import Unpacker, pack

# prctl(2): the signal that this process gets when the thread that forked it dies.
PR_SET_PDEATHSIG = 1

# A rank whose neighbour died fails too, in the middle of a collective: the first cause is the one
# to tell. What may be an echo waits for a surer cause; rank 0's own error, which may be the echo of
# any other's, waits for longer. (Nobody can be an echo of rank 0: its sockets live until it ends.)
DOUBT_S, ECHO_S = 0.3, 1.0

# How long a rank may take to end by itself when its line has ended.
END_S = 1.0


@dataclass(frozen=True)
class Fault:
    """Why a gang cannot go on. `status` is what its worker exits with."""

    status: int
    reason: str
    result: dict[str, Any]
    sure: bool = True  # a cause of its own, not the echo of somebody else's


@dataclass(frozen=True)
class Rank:
    """Another rank, as rank 0 knows it."""

    number: int
    os_pid: int
    line: socket.socket


def fork(order: dict[str, Any], listener: socket.socket) -> Team:
    """Fork the other ranks of a worker -> rank 0's end of them. Only here: before any thread.

    `order["ranks"]` has `cores` for each rank, rank 0's own first. In the others this does not
    return.
    """
    places = order.get("ranks") or [{}]
    made: list[Rank] = []
    parent = os.getpid()
    for number in range(1, len(places)):
        mine, theirs = socket.socketpair()
        os_pid = os.fork()
        if os_pid == 0:
            for inherited in (listener, mine, *(r.line for r in made)):
                inherited.close()
            _become(Follower(order, theirs, number, len(places)), parent, places[number])
        theirs.close()
        made.append(Rank(number, os_pid, mine))
    return Team(made)


def _become(follower: Follower, parent: int, place: dict[str, Any]) -> NoReturn:
    import ctypes  # not at the top: the kernel reads this module's neighbours at boot

    status = 70
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # It may have died before the line above.
        if os.getppid() == parent:
            if place.get("cores"):
                os.sched_setaffinity(0, place["cores"])
            status = follower.run()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


class Team:
    """Rank 0's end of the other ranks. Of a worker on one device it is empty, and costs nothing."""

    def __init__(self, ranks: list[Rank]) -> None:
        self._ranks = ranks
        self.size = 1 + len(ranks)
        self._said: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._ending = False

    def watch(self, on_fault: Callable[[Fault], None]) -> None:
        """Have `on_fault` called, in a thread, when a rank dies or fails."""
        if self._ranks:
            threading.Thread(
                target=self._watch, args=(on_fault,), name="ranks", daemon=True
            ).start()

    def tell(self, message: dict[str, Any]) -> None:
        """Say the same to all other ranks; who is dead is the watcher's to notice."""
        if not self._ranks:
            return
        frame = pack(message)
        for rank in self._ranks:
            with contextlib.suppress(OSError):
                rank.line.sendall(frame)

    def await_saved(self) -> None:
        """Until each of the others has written its part of a checkpoint. Raises OSError when one
        could not."""
        for _ in self._ranks:
            said = self._said.get()
            if said.get("errno"):
                raise OSError(said["errno"], os.strerror(said["errno"]))

    def end(self) -> None:
        """No rank is left when this returns. One that cannot hear (a collective) is killed."""
        self._ending = True
        for rank in self._ranks:
            with contextlib.suppress(OSError):
                rank.line.shutdown(socket.SHUT_RDWR)
        deadline = time.monotonic() + END_S
        left = self._ranks
        while left and time.monotonic() < deadline:
            left = [r for r in left if _status(r.os_pid, os.WNOHANG) is None]
            if left:
                time.sleep(0.002)
        for rank in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.os_pid, signal.SIGKILL)
            _status(rank.os_pid)

    # ---- the thread that watches ----

    def _watch(self, on_fault: Callable[[Fault], None]) -> None:
        fault = self._first_fault()
        if not self._ending:
            on_fault(fault)

    def _first_fault(self) -> Fault:
        """Read all lines until a rank is surely at fault, or may be and nobody else is."""
        unpackers = {rank.number: Unpacker() for rank in self._ranks}
        by_fd = {rank.line.fileno(): rank for rank in self._ranks}
        poll = select.poll()
        for fd in by_fd:
            poll.register(fd, select.POLLIN)
        doubtful: Fault | None = None
        while True:
            ready = poll.poll(DOUBT_S * 1000 if doubtful else None)
            if not ready and doubtful is not None:
                return doubtful
            for fd, _ in ready:
                fault = self._read(by_fd[fd], unpackers[by_fd[fd].number])
                if fault is None:
                    continue
                if fault.sure:
                    return fault
                poll.unregister(fd)  # it ends now, which is no news
                doubtful = doubtful or fault

    def _read(self, rank: Rank, unpacker: Unpacker) -> Fault | None:
        try:
            data = rank.line.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            return _death(rank)
        for message in unpacker.feed(data):
            if message["k"] == "failed":
                reason = f"rank {rank.number}: {message['reason']}"
                return Fault(1, reason, message["result"], message["sure"])
            self._said.put(message)
        return None


def _death(rank: Rank) -> Fault:
    """What to say of a rank whose line ended: it dies within the moment."""
    code = _status(rank.os_pid) or 0
    if code < 0:
        reason = f"rank {rank.number} was killed by {signal.Signals(-code).name}"
        return Fault(128 - code, reason, {})
    return Fault(code or 1, f"rank {rank.number} ended with exit status {code}", {})


def _status(os_pid: int, flags: int = 0) -> int | None:
    """The exit code of a child (negative: a signal), 0 where another has it; None: it lives."""
    try:
        found, raw = os.waitpid(os_pid, flags)
    except ChildProcessError:
        return 0
    return os.waitstatus_to_exitcode(raw) if found else None


class Follower:
    """Any rank but the first: it does what it is told. Its program's Context, too."""

    def __init__(self, order: dict[str, Any], line: socket.socket, rank: int, ranks: int) -> None:
        self._line = line
        self._unpacker = Unpacker()
        self._folder = Path(order["folder"])
        self.program: Any = None
        # Context
        self.gate = Gate(lambda message: None)  # rank 0 is held; the others wait for it
        self.pid = 0
        self.home = Path(order["home"])
        self.work = self._folder
        self.device = "cpu"
        self.threads = 1
        self.environment: dict[str, str] = dict(order.get("env") or {})
        self.rank, self.ranks = rank, ranks

    def run(self) -> int:
        """Until the line ends -> the exit status."""
        try:
            while data := self._hear():
                for message in self._unpacker.feed(data):
                    self.take(message)
        except Exception as exc:  # noqa: BLE001  whatever a program raises is rank 0's to tell
            reason, result, sure = last_words(exc, self.where())
            self.say({"k": "failed", "reason": reason, "result": result, "sure": sure})
            return 1
        finally:
            if self.program is not None:
                self.program.close()
        return 0

    def where(self) -> Where:
        return Where(getattr(self.program, "name", "the program"), self.device)

    def _hear(self) -> bytes:
        """The next bytes from rank 0; none when it is gone."""
        try:
            return self._line.recv(1 << 16)
        except OSError:
            return b""

    def take(self, m: dict[str, Any]) -> None:
        match m["k"]:
            case "load":
                self.load(m)
            case "restore":
                self.program.restore(Path(m["folder"]))
            case "step":
                self.program.step(self)
            case "shrink":
                self.program.shrink(self, m["level"])
                memory.drop_caches(self.device)
            case "save":
                self.say({"k": "saved", "errno": self.save(Path(m["folder"]))})

    def save(self, folder: Path) -> int:
        """-> 0, or what the disk said: rank 0 decides what that means for all."""
        try:
            self.program.save(folder)
        except OSError as exc:
            return exc.errno or errno.EIO
        return 0

    def load(self, m: dict[str, Any]) -> None:
        self.pid, self.work = m["pid"], Path(m["work"])
        place = m["ranks"][self.rank]
        self.device, self.threads = place["device"], place["threads"]
        make_ready(self.device, self.threads)
        join(self._folder, self.rank, self.ranks, self.device)
        cls = load_program(m["entry"])
        self.program = cls(build_args(cls, m["args"]))
        self.program.load(self)

    def say(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self._line.sendall(pack(message))

    # ---- what the program sees; rank 0 speaks for all ----

    def clock(self) -> float:
        return time.monotonic()

    def can_checkpoint(self) -> None:
        """Said once, by rank 0."""

    def emit(self, kind: str, pid: int | None = None, **values: Any) -> None:
        """Said once, by rank 0."""

    def guest_done(self, pid: int, done: Any) -> None:
        raise NotImplementedError("a guest lives on one device")

    def guest_idle(self, pid: int) -> None:
        raise NotImplementedError("a guest lives on one device")

    def call(self, method: str, /, **arguments: Any) -> Any:
        raise NotImplementedError(f"{method}: services are called by rank 0")


# Collectives never time out: 20 days, since gloo counts milliseconds in 31 bits.
COLLECTIVE_S = 20 * 86_400.0


def join(folder: Path, rank: int, ranks: int, device: str, limit_s: float = COLLECTIVE_S) -> None:
    """Make torch.distributed ready: ranks meet in a file in `folder` and talk over loopback.

    gloo on a CPU, NCCL on GPUs. A collective that takes longer than `limit_s` fails.
    """
    from datetime import timedelta

    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    limit = timedelta(seconds=limit_s)
    store = dist.FileStore(  # type: ignore[attr-defined]  # made in C++
        str(folder / "ranks"), ranks
    )
    store.set_timeout(limit)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=limit)
