"""The worker: an OS process that runs one program, step by step, under the kernel's orders.

Between two steps it reads its messages: checkpoint, stop, guests, moves. On a CPU a hold needs no
message (it is a signal that stops the whole process); elsewhere it is asked for at the gate. Knows
no program; it is given an entry point.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from pathlib import Path
from typing import Any

from llmos.drivers.worker import memory
from llmos.drivers.worker.calling import Calling
from llmos.drivers.worker.gate import Gate
from llmos.drivers.worker.guests import Guests
from llmos.drivers.worker.keeping import Keeping, Stopped
from llmos.drivers.worker.link import ALONE_S, Link
from llmos.drivers.worker.on_device import OnDevice
from llmos.drivers.worker.orderly import on_term
from llmos.drivers.worker.output import write_whole
from llmos.drivers.worker.programs import build_args, load_program, make_ready
from llmos.drivers.worker.pulse import Pulse
from llmos.drivers.worker.ranks import ECHO_S, Fault, Team, join
from llmos.drivers.worker.reap import let_go
from llmos.drivers.worker.records import FLUSH_S, Records
from llmos.drivers.worker.words import Where, last_words

# A kernel dials its workers at once; after so long none ever will.
DIALLED_S = 45.0

# How long a worker that has ended waits for the kernel to have heard of it.
LAST_WORDS_S = 5.0


class Worker:
    """The loop, and the Context that the program sees."""

    def __init__(
        self, order: dict[str, Any], listener: socket.socket, team: Team | None = None
    ) -> None:
        self.team = team or Team([])  # the ranks on other devices
        self.program: Any = None
        self.keeping: Keeping | None = None  # made when it loads, as the program is
        self.loaded = False
        self.later: list[dict[str, Any]] = []
        # Context
        self.pid = 0
        self.home = Path(order["home"])
        self.work = Path(order["folder"])
        self.device = "cpu"
        self.threads = 1
        self.environment: dict[str, str] = dict(order.get("env") or {})
        self.rank, self.ranks = 0, self.team.size
        self.folder = Path(order["folder"])
        self._last = threading.Lock()  # who holds it says the last words
        self.gate = Gate(lambda message: self.link.post(message))
        self.records = Records(self._post)
        self.guests = Guests(self, self.records, self._post)
        self.on_device = OnDevice(self.device, self.work)
        self.link = Link(
            listener, order["worker_id"], order.get("secret", ""), self.hello, self.gate.hears,
            self.left_alone, float(order.get("alone_s", ALONE_S)), order.get("owner"),
        )  # fmt: skip
        self._calling = Calling(self.link, self.gate, self.later)

    def _post(self, message: dict[str, Any], keep: bool = False) -> None:
        self.link.post(message, keep)

    def hello(self) -> dict[str, Any]:
        return {
            "loaded": self.loaded,
            "step": self.keeping.step if self.keeping is not None else 0,
            "pid": self.pid,
            **self.guests.hello(),
            "away": self.on_device.is_out,
            **self.on_device.bytes(),
        }

    # ---- what the program sees (services/programs/base.py: Context) ----

    def clock(self) -> float:
        return time.monotonic() - self.link.held_s

    def emit(self, kind: str, pid: int | None = None, **values: Any) -> None:
        self.records.add(self.pid if pid is None else pid, kind, values)

    def guest_done(self, pid: int, done: Any) -> None:
        self.guests.end(pid, done.status, done.reason, done.result)

    def guest_idle(self, pid: int) -> None:
        self.guests.waits(pid)

    def can_checkpoint(self) -> None:
        self.link.post({"k": "can_checkpoint"}, keep=True)

    def call(self, method: str, /, **arguments: Any) -> Any:
        return self._calling.call(method, arguments)

    # ---- the loop ----

    def run(self) -> int:
        """Load, step until done -> the exit status of the OS process."""
        try:
            self.team.watch(self.on_fault)
            self.load(self.await_load())
            while True:
                self.gate.boundary("between steps")
                self.obey(wait=False)
                self.records.in_step = True
                if self.keeping is not None:
                    self.keeping.saver.moved_on()
                self.team.tell({"k": "step"})
                try:
                    outcome = self.program.step(self)
                finally:
                    self.records.in_step = False
                done = self.after_step(outcome)
                if done is not None:
                    return self.finish(done.status, done.reason, done.result)
        except Stopped:
            return 0
        except Exception as exc:  # noqa: BLE001  whatever a program raises ends its process alone
            reason, result, sure = last_words(exc, self.where())
            if not sure and self.team.size > 1:
                # It may be the echo of another rank's death, whose words come first.
                time.sleep(ECHO_S)
            return self.finish(1, reason, result)
        finally:
            if self.program is not None:
                self.program.close()

    @property
    def kept(self) -> Keeping:
        """Its checkpoints, once it has loaded."""
        assert self.keeping is not None, "it has not loaded"
        return self.keeping

    def where(self) -> Where:
        name = getattr(self.program, "name", "the program")
        return Where(name, self.device, self.link.promised_bytes)

    def on_fault(self, fault: Fault) -> None:
        """Another rank cannot go on, so nobody can. In a thread: a collective may never return."""
        self.finish(fault.status, fault.reason, fault.result)
        self.team.end()
        os._exit(fault.status)

    def await_load(self) -> dict[str, Any]:
        """What to run; a worker that no kernel ever dials was lost in its birth, and ends."""
        while True:
            try:
                with self.gate.away():
                    message = self.link.inbox.get(timeout=DIALLED_S)
            except queue.Empty:
                if not self.link.met:
                    raise Stopped from None
                continue
            if message["k"] == "load":
                return message
            self.later.append(message)

    def load(self, m: dict[str, Any]) -> None:
        Pulse(lambda: self.link.post({"k": "alive"}))
        self.pid, self.work = m["pid"], Path(m["work"])
        self.device, self.threads = m["device"], m["threads"]
        self.records.open(self.pid, self.work)
        self.on_device = OnDevice(self.device, self.work)
        self.on_device.prepare(self.gate)
        for early in [m for m in self.later if m["k"] == "limit"]:
            self.take(early)  # before anything is allocated
        if self.device:
            make_ready(self.device, self.threads)
        if self.ranks > 1:
            self.team.tell(m)
            join(self.folder, 0, self.ranks, self.device)
        cls = load_program(m["entry"])
        self.program = cls(build_args(cls, m["args"]))
        self.keeping = Keeping(self, m)
        self.program.load(self)
        self.keeping.restore()
        if cls.ends_in_order:
            on_term(lambda: self.link.deliver({"k": "stop"}))
        self.loaded = True
        self.link.post({"k": "loaded", **self.on_device.bytes()}, keep=True)

    def left_alone(self) -> None:
        """No kernel comes. Nobody stays held: what was stopped with this worker goes on, too."""
        self.gate.give_up()
        let_go(os.getpid(), self.folder)

    def wait_for_a_kernel(self) -> None:
        """At a safepoint: keep what there is, and leave the device until somebody has books again.

        It costs at most this one checkpoint: a kernel that comes adopts this worker as it is.
        """
        if self.program.has_checkpoint:
            self.kept.save(beside=False)  # it waits in any case
        self.emit("note", text=f"no kernel: waits at step {self.kept.step} until one comes")
        while self.link.is_alone:
            self.obey(wait=True)

    def after_step(self, outcome: Any) -> Any:
        """Tell the kernel about a step -> the outcome when it was the last."""
        name = type(outcome).__name__
        if name == "Done":
            return outcome
        if name == "Idle":
            self.records.tell_marks()
            self.link.post(self.guests.idle_report())
            self.obey(wait=True)
            return None
        if name == "Waiting":
            self.records.tell_marks()
            self.link.wait(outcome.on, outcome.at_most_s)
            return None
        self.kept.step = outcome.step
        if not outcome.shares:
            self.records.progress(
                self.pid, {"step": outcome.step, "total": outcome.total, "metrics": outcome.metrics}
            )
        self.link.post(
            {"k": "report", "step": outcome.step, "total": outcome.total,
             "metrics": outcome.metrics, "shares": outcome.shares,
             "marks": self.records.take_marks(), **self.on_device.bytes()}
        )  # fmt: skip
        self.kept.stepped()
        if self.link.is_alone:
            self.wait_for_a_kernel()
        return None

    def finish(self, status: int, reason: str, result: dict[str, Any]) -> int:
        """The last words: on disk first, for a kernel that comes later, then over the line."""
        self._last.acquire()  # never given back: who comes second waits for the end
        if self.keeping is not None:
            self.keeping.saver.end(wanted=status != 0)  # after a failure it may go on from there
        end = {"status": status, "reason": reason, "result": result}
        written = self.write_last(end)
        self.records.tell_marks()
        self.link.post({"k": "done", **end}, keep=True)
        while not written:
            # What it said must not be lost, nor how it ended: it stays until there is room. The
            # kernel knows by now that it wants no more turns.
            time.sleep(FLUSH_S)
            written = self.write_last(end)
        deadline = time.monotonic() + LAST_WORDS_S
        while self.link.kept() and time.monotonic() < deadline:
            time.sleep(0.002)
        return status

    def write_last(self, end: dict[str, Any]) -> bool:
        """Everything it said and its last words -> whether the disk took all of it."""
        if not self.records.flush():
            return False
        try:
            write_whole(self.work / "result.json", end)
        except OSError:
            return False
        return True

    # ---- orders ----

    def obey(self, wait: bool) -> None:
        """Handle what the kernel said; with `wait` at least one message."""
        while True:
            self.records.retry()
            while self.later:
                self.take(self.later.pop(0))
                wait = False
            if self.on_device.is_out:
                self.stay_out()
                continue
            try:
                self.take(self.next_message(wait))
            except queue.Empty:
                if wait:
                    continue  # something waits for the disk: looked at twice a second
                return
            wait = False

    def stay_out(self) -> None:
        """What was moved out cannot compute: it waits for its return, or its end.

        Copies are nobody's time, so it comes back before it has a lease: while others compute.
        """
        with self.gate.away():
            while self.on_device.is_out:
                message = self.link.inbox.get()
                match message["k"]:
                    case "move_out":
                        self.move_out(str(message["where"]))
                    case "move_in":
                        self.move_in()
                    case "stop" | "checkpoint":  # there must be something to write
                        self.later.append(message)
                        self.move_in()
                    case _:
                        self.later.append(message)

    def next_message(self, wait: bool) -> dict[str, Any]:
        if not wait:
            return self.link.inbox.get_nowait()
        with self.gate.away():
            return self.link.inbox.get(timeout=FLUSH_S if self.records.behind else None)

    def take(self, m: dict[str, Any]) -> None:
        match m["k"]:
            case "stop":
                self.kept.stop()
            case "checkpoint":
                self.kept.ask()
            case "shrink":
                self.shrink(m["level"])
            case "lease":
                self.program.floor(m["floor"])
            case "limit":
                self.on_device.limit(int(m.get("own_bytes", 0)))
            case "move_out":
                with self.gate.away():
                    self.move_out(str(m["where"]))
            case "admit" | "drop" | "rank" | "input":
                self.guests.take(m)

    # ---- memory ----

    def shrink(self, level: str) -> None:
        """Take less memory, and tell how much that gave back at once.

        Of a smaller batch most comes with the steps that follow: their peak is lower.
        """
        before = memory.had_now(self.device)
        if self.keeping is not None:
            self.keeping.saver.release()
        self.team.tell({"k": "shrink", "level": level})  # before the next step: all or none
        shrank = bool(self.program.shrink(self, level))
        memory.drop_caches(self.device)
        freed = max(0, before - memory.had_now(self.device))
        said = {"k": "shrunk", "level": level, "shrank": shrank, "freed_bytes": freed}
        self.link.post(said, keep=True)

    def move_out(self, where: str) -> None:
        self.link.post(self.on_device.move_out(self.program.tensors, where), keep=True)

    def move_in(self) -> None:
        said = self.on_device.move_in()
        if said is not None:
            self.link.post(said, keep=True)


def main(order: dict[str, Any], listener: socket.socket, team: Team) -> int:
    try:
        return Worker(order, listener, team).run()
    finally:
        team.end()
