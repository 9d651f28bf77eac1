"""Chaos: mixed work on a real machine, random faults, and an audit after each of them.

The faults, their order and what they hit follow from the seed. What the machine has done by the
time of a fault does not: that is what makes them random.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmos.drivers.cpu import procfs
from llmos.kernel import protocol as p
from llmos.kernel.errors import LlmosError
from llmos.shell import Client
from support.machine import TEXT
from support.real import Machine, has_socket, wait_until

MIB = 1024**2

CONFIG = """\
hang_s = 4
alone_s = 2
"""

TRAINING = {
    "width": 32, "layers": 1, "heads": 2, "context": 64, "batch": 4, "vocab_size": 300,
    "dtype": "float32", "threads": 1, "save_every": 10,
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """Work whose result is the same each time."""

    program: str
    args: dict[str, Any]
    out: bool = False  # it makes a model, whose weights are the result


@dataclass
class Job:
    kind: str
    pid: int
    out: str = ""


class Reader:
    """A client in a thread of its own that reads one attached generation to its end."""

    def __init__(self, home: Path, args: dict[str, Any]) -> None:
        self.tokens: list[int] = []
        self.error: BaseException | None = None
        self.ended: dict[str, Any] = {}
        self.pid = 0
        self.client: Client | None = None
        self.thread = threading.Thread(target=self._read, args=(home, args), daemon=True)
        self.thread.start()

    def _read(self, home: Path, args: dict[str, Any]) -> None:
        try:
            self.client = Client(home, reconnect_s=120)
            with self.client as client:
                self.pid = client.submit("infer", args, attached=True)
                stream = client.attach(self.pid)
                for record in stream:
                    self.tokens += record.get("tokens", ())
                self.ended = stream.result or {}
        except BaseException as exc:  # noqa: BLE001  the run tells of it
            self.error = exc

    @property
    def is_acknowledged(self) -> bool:
        return bool(self.tokens)

    def drop(self) -> None:
        if self.client is not None:
            with contextlib.suppress(OSError):
                self.client._socket.shutdown(socket.SHUT_RDWR)


@dataclass
class Chaos:
    m: Machine
    seed: int
    folder: Path
    model: str
    can_fill: bool = False  # the home has a small disk of its own
    say: Callable[[str], None] = lambda text: None
    jobs: list[Job] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)
    calm: dict[str, Any] = field(default_factory=dict)
    acknowledged: set[int] = field(default_factory=set)
    done: dict[str, int] = field(default_factory=dict)
    resubmitted: int = 0
    engine_deaths: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        text, images = self.folder / "text.txt", self.folder / "images.npz"
        text.write_text(TEXT)
        squares = np.zeros((40, 12, 12), np.uint8)
        squares[:, 3:8, 3:8] = 255
        np.savez(images, squares)
        self.kinds = {
            "spin": Kind("spin", {"steps": 120, "busy_ms": 8, "seed": 3}),
            "pretrain": Kind("pretrain", {"data": str(text), "steps": 150, **TRAINING}, out=True),
            "gan": Kind("gan", {"data": str(images), "steps": 80, "batch": 8, "latent": 8,
                                "width": 8, "threads": 1}, out=True),
        }  # fmt: skip
        self.faults: dict[str, Callable[[], None]] = {
            "kill kernel": self.kill_kernel,
            "kill zygote": self.kill_zygote,
            "kill worker": self.kill_worker,
            "stop worker": self.stop_worker,
            "torn checkpoint": self.tear_checkpoint,
            "dropped connection": self.drop_connection,
            "restart": self.restart,
        }
        if self.can_fill:
            self.faults["disk full"] = self.fill_disk

    # ---- the work ----

    def infer_args(self) -> dict[str, Any]:
        return {"model": self.model, "prompt": "the cat", "max_tokens": 200, "seed": 1,
                "dtype": "float32", "temperature": 0}  # fmt: skip

    def measure_calm(self) -> None:
        """What everything comes to when nobody is disturbed."""
        for name in self.kinds:
            job = self.submit(name)
            assert self.m.end_of(job.pid)["exit_status"] == 0, name
            self.calm[name] = self.result(job)
        reader = Reader(self.m.home, self.infer_args())
        reader.thread.join(180)
        assert reader.ended.get("exit_status") == 0, (reader.error, reader.ended)
        self.calm["infer"] = reader.tokens

    def submit(self, name: str) -> Job:
        kind = self.kinds[name]
        out = f"{name}-{len(self.acknowledged)}-{self.random.randrange(10**9)}" if kind.out else ""
        args = {**kind.args, **({"out": out} if out else {})}
        request = p.Submit(kind.program, args, restart="on-failure:999999")
        pid = int(self.ask(request)["pid"])
        self.acknowledged.add(pid)
        return Job(name, pid, out)

    def ask(self, request: p.Request) -> Any:
        """Ask until somebody is there to answer: a disk may be full, a kernel may be coming."""
        for left in range(600, -1, -1):
            try:
                return self.m.ask(request)
            except (OSError, LlmosError) as exc:
                if not left or (isinstance(exc, LlmosError) and exc.code not in _PASSING):
                    raise
                time.sleep(0.1)
        raise AssertionError

    def result(self, job: Job) -> Any:
        if job.out:
            files = sorted((self.m.home / "models" / job.out).glob("*.safetensors"))
            return [(f.name, f.read_bytes()) for f in files]
        return self.ask(p.Wait(job.pid, 60.0))["result"]["checksum"]

    def keep_busy(self) -> None:
        """Two trainings, a GAN, four generations; now and then somebody who is killed at once."""
        self.harvest()
        for name in self.kinds:
            if not any(j.kind == name for j in self.jobs):
                self.jobs.append(self.submit(name))
        while len(self.readers) < 4:
            self.readers.append(Reader(self.m.home, self.infer_args()))
        if self.random.random() < 0.3:
            pid = self.submit("spin").pid
            ended = self.ask(p.Kill(pid, 15))
            assert ended["exit_status"] in (143, 0), ended

    def harvest(self) -> None:
        """Look at what has ended: it must be what nobody's disturbance can change."""
        rows = {r["pid"]: r for r in self.ask(p.Ps(all=True))}
        for job in list(self.jobs):
            row = rows[job.pid]
            if row["state"] != "exited":
                continue
            assert row["exit_status"] == 0, row
            assert self.result(job) == self.calm[job.kind], f"{job.kind} {job.pid} is another"
            self.jobs.remove(job)
            self.count(job.kind)
        for reader in list(self.readers):
            if reader.thread.is_alive():
                continue
            self.readers.remove(reader)
            if reader.error is not None and not reader.is_acknowledged:
                self.resubmitted += 1  # an attached one that no engine had: its client asks again
                continue
            assert reader.error is None, reader.error
            assert reader.ended["exit_status"] == 0, reader.ended
            calm = self.calm["infer"]
            assert len(reader.tokens) == len(calm), (len(reader.tokens), len(calm))
            # A prompt that holds what was sent rounds otherwise than one token after the other.
            assert reader.tokens == calm or self.engine_deaths, "another text"
            self.count("infer")

    def count(self, kind: str) -> None:
        self.done[kind] = self.done.get(kind, 0) + 1

    # ---- the faults ----

    def kill_kernel(self) -> None:
        self.m.kill_kernel()
        self.m.boot()

    def kill_zygote(self) -> None:
        with contextlib.suppress(ProcessLookupError, TypeError):
            os.kill(int(self.ask(p.Status())["zygote"]["os_pid"]), signal.SIGKILL)

    def some_worker(self, *programs: str) -> dict[str, Any] | None:
        rows = [
            r for r in self.ask(p.Ps())
            if r["worker_id"] and r["role"] in ("process", "engine")
            and (not programs or r["program"] in programs)
        ]  # fmt: skip
        return self.random.choice(rows) if rows else None

    def signal_worker(self, row: dict[str, Any] | None, number: int) -> None:
        if row is None:
            return
        with contextlib.suppress(ProcessLookupError, AssertionError, LlmosError):
            os_pid = self.m.worker_of(row["pid"])
            self.engine_deaths += row["role"] == "engine"
            os.kill(os_pid, number)

    def kill_worker(self) -> None:
        self.signal_worker(self.some_worker(), signal.SIGKILL)

    def stop_worker(self) -> None:
        self.signal_worker(self.some_worker(), signal.SIGSTOP)

    def tear_checkpoint(self) -> None:
        row = self.some_worker("pretrain", "gan")
        if row is None:
            return
        newest = sorted((self.m.home / "procs" / str(row["pid"]) / "checkpoints").glob("step-*"))
        with contextlib.suppress(FileNotFoundError, IndexError):
            file = sorted(newest[-1].glob("*.safetensors"))[0]
            with file.open("r+b") as f:
                f.truncate(file.stat().st_size // 2)
        self.signal_worker(row, signal.SIGKILL)

    def drop_connection(self) -> None:
        if self.readers:
            self.random.choice(self.readers).drop()

    def restart(self) -> None:
        # A deliberate shutdown ends what is attached: nobody is to be there.
        for reader in self.readers:
            reader.thread.join(240)
        self.harvest()
        self.m.shutdown()
        self.m.boot()

    def fill_disk(self) -> None:
        ballast = self.m.home / "ballast"
        # Unbuffered: what is written at the close would meet the full disk outside of this.
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as f:
            while True:
                f.write(b"x" * MIB)
        seen = {j.pid: self._step(j.pid) for j in self.jobs}
        with contextlib.suppress(AssertionError):
            wait_until(lambda: any(self._step(k) > v + 2 for k, v in seen.items()), "a step", 20)
        ballast.unlink(missing_ok=True)

    def _step(self, pid: int) -> int:
        with contextlib.suppress(OSError, LlmosError, IndexError):
            return int(self.m.row(pid)["progress"].get("step", 0))
        return 0

    # ---- the audit ----

    def audit(self) -> None:
        """Everybody acknowledged is there; the books add up; nobody and nothing is left over."""
        wait_until(self.answers, "the kernel to answer", 60)
        known = {r["pid"] for r in self.ask(p.Ps(all=True))}
        assert self.acknowledged <= known, f"lost: {self.acknowledged - known}"
        self.until_none(self.strangers, "orphans")
        self.until_none(self.stray_folders, "folders")
        self.until_none(self.wrong_books, "books")
        assert self.m.process is not None
        count = len(os.listdir(f"/proc/{self.m.process.pid}/fd"))
        expected = 40 + 6 * (len(self.readers) + len(self.jobs) + 4)
        assert count <= expected, f"{count} descriptors in the kernel"

    def until_none(self, found: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + 60
        while left := found():
            assert time.monotonic() < deadline, f"{what}: {left}"
            time.sleep(0.05)

    def answers(self) -> bool:
        with contextlib.suppress(OSError, LlmosError):
            return bool(self.m.ask(p.Status()))
        return False

    def workers(self) -> dict[str, int]:
        """Live workers by id, from the table and the system."""
        found = {}
        ids = {r["worker_id"] for r in self.ask(p.Ps()) if r["worker_id"]}
        for os_pid in self.m.os_pids():
            for worker_id in ids:
                if has_socket(os_pid, self.m.home / "w" / worker_id / "sock"):
                    found[worker_id] = os_pid
        return found

    def strangers(self) -> dict[int, str]:
        """OS processes of this machine that nobody accounts for."""
        assert self.m.process is not None
        kernel = self.m.process.pid
        mine = {kernel, *self.workers().values()}
        with contextlib.suppress(LlmosError, TypeError):
            mine.add(int(self.ask(p.Status())["zygote"]["os_pid"]))
        mine |= {int(s["os_pid"]) for s in self.ask(p.Services()) if s["os_pid"]}
        for os_pid in list(mine - {kernel}):
            mine |= set(procfs.children(os_pid))
        return {k: v for k, v in self.m._who().items() if k not in mine}

    def stray_folders(self) -> set[str]:
        ids = {r["worker_id"] for r in self.ask(p.Ps()) if r["worker_id"]}
        return set(os.listdir(self.m.home / "w")) - ids

    def wrong_books(self) -> list[str]:
        wrong = []
        for book in self.ask(p.Mem()):
            if book["promised_bytes"] > book["capacity_bytes"]:
                wrong.append(f"{book['device']}: more is promised than there is")
            segments = sum(s["bytes"] for s in book["segments"])
            if segments != book["promised_bytes"]:
                wrong.append(
                    f"{book['device']}: {segments} in segments of {book['promised_bytes']}"
                )
        workers = self.workers()
        for row in self.ask(p.Ps()):
            os_pid = workers.get(row["worker_id"] or "")
            if os_pid is None or row["role"] == "guest" or not row["memory"]["measured_bytes"]:
                continue
            now = sum(map(procfs.private_bytes, procfs.children(os_pid)))
            booked = row["memory"]["measured_bytes"]
            if abs(now - booked) > max(48 * MIB, 0.4 * booked):
                wrong.append(f"process {row['pid']}: {booked} in the books, {now} by the system")
        return wrong

    # ---- the run ----

    def run(self, faults: int) -> None:
        self.measure_calm()
        names = sorted(self.faults)
        for number in range(faults):
            self.keep_busy()
            time.sleep(self.random.uniform(0.05, 1.5))
            name = names[number % len(names)] if number < len(names) else self.random.choice(names)
            self.say(f"{number + 1}/{faults} {name}; done {self.done}")
            self.faults[name]()
            self.audit()
        self.finish()

    def finish(self) -> None:
        """Everything that was begun comes to its end."""
        deadline = time.monotonic() + 600
        while self.jobs or self.readers:
            assert time.monotonic() < deadline, (self.jobs, [r.pid for r in self.readers])
            self.harvest()
            time.sleep(0.2)
        self.audit()


# Answers that say: not now.
_PASSING = frozenset({"busy", "home-unusable", "no-kernel", "worker-lost", "timed-out"})


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[bool]:
    """A disk of its own at `folder`, where one may mount -> whether it is."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "llmos-chaos", str(folder)],
        capture_output=True,
    )
    mounted = done.returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)
