"""The worker: an OS process that runs one program, step by step, under the kernel's orders.

Between two steps it reads its messages: checkpoint, stop, guests, moves. On a CPU a hold needs no
message (it is a signal that stops the whole process); elsewhere it is asked for at the gate. Knows
no program; it is given an entry point.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmos.drivers.worker import checkpoint, memory
from llmos.drivers.worker.gate import Gate
from llmos.drivers.worker.link import ALONE_S, Link
from llmos.drivers.worker.output import write_whole
from llmos.drivers.worker.programs import build_args, load_program, make_ready
from llmos.drivers.worker.pulse import Pulse
from llmos.drivers.worker.ranks import ECHO_S, Fault, Team, join
from llmos.drivers.worker.reap import let_go
from llmos.drivers.worker.saving import CHECKPOINT_S, Plan, Saver
from llmos.drivers.worker.stream import Stream, whole_records
from llmos.drivers.worker.words import Where, last_words, line_of
from llmos.kernel.errors import (
    HomeUnusable,
    IllegalMove,
    LlmosError,
    NoMemory,
    TimedOut,
    from_wire,
)

if TYPE_CHECKING:
    from llmos.drivers.worker.moves import Moves

# A kernel dials its workers at once; after so long none ever will.
DIALLED_S = 45.0

# How long a service may take to answer, in seconds that the worker is not held for: it waits in
# pieces, and a hold, however long, costs no more than the piece it falls into.
CALL_S = 120.0
CALL_PIECE_S = 1.0

# Records that a full disk did not take are tried again after so long.
FLUSH_S = 0.5

# How long a worker that has ended waits for the kernel to have heard of it.
LAST_WORDS_S = 5.0


class Stopped(Exception):
    """The worker is to end at this safepoint."""


class Worker:
    """The loop, and the Context that the program sees."""

    def __init__(
        self, order: dict[str, Any], listener: socket.socket, team: Team | None = None
    ) -> None:
        self.team = team or Team([])  # the ranks on other devices
        self.program: Any = None
        self.saver: Saver = None  # type: ignore[assignment]  # made when it loads
        self.reserved = False
        self.loaded = False
        self.step = 0
        self.streams: dict[int, Stream] = {}
        self.marks: set[int] = set()
        self.guests: set[int] = set()
        self.waiting: set[int] = set()  # guests that wait for input
        self.read_keys: dict[int, set[str]] = {}  # by guest: the inputs that it has had
        self.rows: dict[int, bytes] = {}  # by guest: its row, for a kernel that comes later
        self.seen = 0
        self.checkpoint_wanted = False
        self.stop_wanted = False
        self.waited_for = False  # somebody has asked for the checkpoint that is made
        self.unsaid: dict[int, tuple[Stream, dict[str, Any]]] = {}  # ends that wait for the disk
        self.flushed_at = 0.0
        self.later: list[dict[str, Any]] = []
        self.calls = 0
        self.in_step = False
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
        self.moves: Moves | None = None  # made with the first order to move
        self.link = Link(
            listener, order["worker_id"], order.get("secret", ""), self.hello, self.gate.hears,
            self.left_alone, float(order.get("alone_s", ALONE_S)), order.get("owner"),
        )  # fmt: skip

    def hello(self) -> dict[str, Any]:
        return {
            "loaded": self.loaded,
            "step": self.step,
            "pid": self.pid,
            "guests": [*self.guests, *self.unsaid],
            "rows": {pid: row for pid, row in self.rows.items() if row},
            "waiting": list(self.waiting),
            "seen": self.seen,
            "away": self.is_out,
            **self.device_bytes(),
        }

    # ---- what the program sees (services/programs/base.py: Context) ----

    def clock(self) -> float:
        return time.monotonic() - self.link.held_s

    def emit(self, kind: str, pid: int | None = None, **values: Any) -> None:
        target = self.pid if pid is None else pid
        if target not in self.streams:
            return  # a guest that was dropped in the middle of this step
        self.streams[target].append(kind, values)
        if self.in_step:
            self.marks.add(target)
        else:
            self.link.post({"k": "mark", "pid": target})

    def guest_done(self, pid: int, done: Any) -> None:
        self._end_guest(pid, done.status, done.reason, done.result)

    def guest_idle(self, pid: int) -> None:
        self._flush_marks(pid)
        self.waiting.add(pid)
        self.link.post({"k": "guest_idle", "pid": pid, "seen": self.seen}, keep=True)

    def can_checkpoint(self) -> None:
        self.link.post({"k": "can_checkpoint"}, keep=True)

    def call(self, method: str, /, **arguments: Any) -> Any:
        self.calls += 1
        number = self.calls
        self.link.post({"k": "call", "id": number, "method": method, "args": arguments}, keep=True)
        pieces = round(CALL_S / CALL_PIECE_S)
        while True:
            try:
                with self.gate.away():
                    message = self.link.inbox.get(timeout=CALL_PIECE_S)
            except queue.Empty:
                pieces -= 1
                if not pieces:
                    raise TimedOut(f"{method}: no answer in {CALL_S:.0f} s") from None
                continue
            if message["k"] == "answer" and message["id"] == number:
                if "error" in message:
                    raise from_wire(message["error"])
                return message.get("ok")
            self.later.append(message)

    # ---- the loop ----

    def run(self) -> int:
        """Load, step until done -> the exit status of the OS process."""
        try:
            self.team.watch(self.on_fault)
            self.load(self.await_load())
            while True:
                self.gate.boundary("between steps")
                self.obey(wait=False)
                self.in_step = True
                if self.saver is not None:
                    self.saver.moved_on()
                self.team.tell({"k": "step"})
                try:
                    outcome = self.program.step(self)
                finally:
                    self.in_step = False
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
        self.streams[self.pid] = Stream(self.work / "stream")
        if self.device.startswith("cuda"):
            self.prepare_cuda()
        for early in [m for m in self.later if m["k"] == "limit"]:
            self.take(early)  # before anything is allocated
        if self.device:
            make_ready(self.device, self.threads)
        if self.ranks > 1:
            self.team.tell(m)
            join(self.folder, 0, self.ranks, self.device)
        cls = load_program(m["entry"])
        self.program = cls(build_args(cls, m["args"]))
        copy = self.device.startswith("cuda") or bool(m.get("copy"))
        plan = Plan.of(self.program.args, copy, float(m.get("checkpoint_s") or CHECKPOINT_S))
        root = self.work / "checkpoints"
        self.saver = Saver(root, plan, self.device, self.saved, self.note)
        self.program.load(self)
        self.restore()
        if cls.ends_in_order:
            signal.signal(signal.SIGTERM, stop_in_order)
        self.loaded = True
        self.link.post({"k": "loaded", **self.device_bytes()}, keep=True)

    def prepare_cuda(self) -> None:
        from llmos.drivers.worker import cuda

        cuda.prepare(self.device)
        self.gate.use(cuda.CudaStreams(self.device))

    def device_bytes(self) -> dict[str, int]:
        """What this worker holds of its device, where only the worker itself may know."""
        if not self.device.startswith("cuda"):
            return {}
        from llmos.drivers.worker import cuda

        return {"device_bytes": cuda.reserved_bytes(self.device)}

    def restore(self) -> None:
        folder = checkpoint.newest(
            self.work / "checkpoints", lambda text: self.emit("note", text=text)
        )
        if folder is None:
            return
        self.team.tell({"k": "restore", "folder": str(folder)})
        self.program.restore(folder)
        self.step = checkpoint.step_of(folder)
        self.saver.restored(folder)
        self.emit("restored", step=self.step)

    def left_alone(self) -> None:
        """No kernel comes. Nobody stays held: what was stopped with this worker goes on, too."""
        self.gate.give_up()
        let_go(os.getpid(), self.folder)

    def wait_for_a_kernel(self) -> None:
        """At a safepoint: keep what there is, and leave the device until somebody has books again.

        It costs at most this one checkpoint: a kernel that comes adopts this worker as it is.
        """
        if self.program.has_checkpoint:
            self.save(beside=False)  # it waits in any case
        self.emit("note", text=f"no kernel: waits at step {self.step} until one comes")
        while self.link.is_alone:
            self.obey(wait=True)

    def after_step(self, outcome: Any) -> Any:
        """Tell the kernel about a step -> the outcome when it was the last."""
        name = type(outcome).__name__
        if name == "Done":
            return outcome
        if name == "Idle":
            self._flush_marks()
            self.link.post({"k": "idle", "seen": self.seen})
            self.obey(wait=True)
            return None
        if name == "Waiting":
            self._flush_marks()
            self.link.wait(outcome.on, outcome.at_most_s)
            return None
        self.step = outcome.step
        if not outcome.shares:
            self.streams[self.pid].append(
                "progress",
                {"step": outcome.step, "total": outcome.total, "metrics": outcome.metrics},
            )
            self.marks.add(self.pid)
        self.link.post(
            {"k": "report", "step": outcome.step, "total": outcome.total,
             "metrics": outcome.metrics, "shares": outcome.shares, "marks": list(self.marks),
             **self.device_bytes()}
        )  # fmt: skip
        self.marks.clear()
        if self.program.has_checkpoint:
            self.save_if_due()
            self.tell_unwritten()
        if self.stop_wanted:
            raise Stopped
        if self.link.is_alone:
            self.wait_for_a_kernel()
        return None

    def save_if_due(self) -> None:
        due = self.saver.stepped(self.step)
        if not self.reserved:
            self.reserved = True  # before the second step, which is the first that is measured
            self.saver.reserve(self.program)
        if due or self.stop_wanted or (self.checkpoint_wanted and not self.saver.busy):
            self.save()

    def save(self, beside: bool = True) -> None:
        """Write a checkpoint, or have one written; a worker that is to stop has then stopped."""
        try:
            # What it takes from the device goes through the copy engine: nobody's time.
            with self.gate.away():
                beside = beside and not self.stop_wanted
                if not (beside and self.saver.beside(self.program, self.step, self.others_fill)):
                    self.step = self.saver.between(self.step, self.fill)
        except IllegalMove:
            self.checkpoint_wanted = self.stop_wanted = False  # it is about to end by itself
            return
        except TimedOut as exc:
            self.note(f"no checkpoint: {exc.message}")
        self.waited_for = self.waited_for or self.checkpoint_wanted or self.stop_wanted
        self.checkpoint_wanted = False
        self.tell_unwritten()
        if self.stop_wanted:
            raise Stopped  # where there is no new one, it goes on from the one before

    def saved(self, folder: Path, step: int) -> None:
        """A checkpoint is on the disk. In any thread."""
        self.link.post({"k": "checkpointed", "folder": str(folder), "step": step}, keep=True)

    def note(self, text: str) -> None:
        """One line for the user; a disk that is full may have no room for it either."""
        with contextlib.suppress(OSError):
            self.emit("note", text=text)

    def tell_unwritten(self) -> None:
        """The disk took no checkpoint. Steps are worth more: it goes on; who has asked for one, or
        for its memory, is told that there is none."""
        busy = self.saver.busy  # first: it looks what has become of the one that was written
        why, self.saver.failed = self.saver.failed, ""
        if why and self.waited_for:
            self.waited_for = self.stop_wanted = False
            error = HomeUnusable(f"no room for a checkpoint: {why}").to_wire()
            self.link.post({"k": "move_failed", "what": "checkpoint", "error": error}, keep=True)
        elif not busy:
            self.waited_for = False

    def fill(self, folder: Path) -> int | None:
        """Everything goes into the checkpoint that any rank has to say -> the step, if it is
        another than the last that was reported."""
        self.team.tell({"k": "save", "folder": str(folder)})
        step: int | None = self.program.save(folder)
        self.team.await_saved()
        return step

    def others_fill(self, folder: Path) -> None:
        """What the other ranks have to say; it is little, and they are at the same step now."""
        self.team.tell({"k": "save", "folder": str(folder)})
        self.team.await_saved()

    def finish(self, status: int, reason: str, result: dict[str, Any]) -> int:
        """The last words: on disk first, for a kernel that comes later, then over the line."""
        self._last.acquire()  # never given back: who comes second waits for the end
        if self.saver is not None:
            self.saver.end(wanted=status != 0)  # after a failure it may go on from there
        end = {"status": status, "reason": reason, "result": result}
        written = self.write_last(end)
        self._flush_marks()
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
        if not all(stream.flush() for stream in self.streams.values()):
            return False
        try:
            write_whole(self.work / "result.json", end)
        except OSError:
            return False
        return True

    def flush_streams(self) -> None:
        """Try again what the disk did not take; readers and the kernel hear of it then."""
        now = time.monotonic()
        if not self.behind() or now - self.flushed_at < FLUSH_S:
            return
        self.flushed_at = now
        for pid, stream in self.streams.items():
            if stream.behind and stream.flush():
                self.link.post({"k": "mark", "pid": pid})
        for pid, (stream, done) in list(self.unsaid.items()):
            if stream.flush():
                del self.unsaid[pid]
                stream.close()
                self.link.post({"k": "mark", "pid": pid})
                self.link.post(done, keep=True)

    def behind(self) -> bool:
        return bool(self.unsaid) or any(stream.behind for stream in self.streams.values())

    # ---- orders ----

    def obey(self, wait: bool) -> None:
        """Handle what the kernel said; with `wait` at least one message."""
        while True:
            self.flush_streams()
            while self.later:
                self.take(self.later.pop(0))
                wait = False
            if self.is_out:
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
            while self.is_out:
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
            return self.link.inbox.get(timeout=FLUSH_S if self.behind() else None)

    def take(self, m: dict[str, Any]) -> None:
        match m["k"]:
            case "stop":
                self.stop_wanted = True
                if not self.program.has_checkpoint:
                    raise Stopped
                if self.step:
                    self.save()
            case "checkpoint":
                self.checkpoint_wanted = True
                if self.step and not self.saver.busy:
                    self.save()
            case "shrink":
                self.shrink(m["level"])
            case "lease":
                self.program.floor(m["floor"])
            case "limit":
                self.limit(int(m.get("own_bytes", 0)))
            case "move_out":
                with self.gate.away():
                    self.move_out(str(m["where"]))
            case "admit":
                self.seen += 1
                self.admit(m)
            case "drop":
                self.seen += 1
                self._close_guest(m["pid"])
                self.unsaid.pop(m["pid"], None)
                self.program.drop(self, m["pid"])
            case "rank":
                self.rows[m["pid"]] = m.get("row", b"")
                self.program.rank(self, m["pid"], tuple(m["rank"]), m["parked"])
            case "input":
                self.seen += 1
                self.give(m["pid"], m["message"], m.get("key", ""))

    # ---- memory ----

    def shrink(self, level: str) -> None:
        """Take less memory, and tell how much that gave back at once.

        Of a smaller batch most comes with the steps that follow: their peak is lower.
        """
        before = memory.had_now(self.device)
        if self.saver is not None:
            self.saver.release()
        self.team.tell({"k": "shrink", "level": level})  # before the next step: all or none
        shrank = bool(self.program.shrink(self, level))
        memory.drop_caches(self.device)
        freed = max(0, before - memory.had_now(self.device))
        said = {"k": "shrunk", "level": level, "shrank": shrank, "freed_bytes": freed}
        self.link.post(said, keep=True)

    def limit(self, nbytes: int) -> None:
        """Elsewhere than on CUDA the limit is set from outside."""
        if self.device.startswith("cuda"):
            from llmos.drivers.worker import cuda

            cuda.limit(self.device, nbytes)

    @property
    def is_out(self) -> bool:
        return self.moves is not None and self.moves.is_out

    def move_out(self, where: str) -> None:
        from llmos.drivers.worker.moves import Moves

        if self.moves is None:
            self.moves = Moves(self.device, self.work / "moved")
        self.moved("moved_out", lambda moves: moves.out(self.program.tensors(), where))

    def move_in(self) -> None:
        if self.is_out:
            self.moved("moved_in", lambda moves: moves.back())

    def moved(self, what: str, move: Callable[[Moves], dict[str, Any]]) -> None:
        """Do it and tell; a move without room for it has changed nothing, and that is told."""
        assert self.moves is not None
        try:
            answer = {"k": what, **move(self.moves)}
        except NoMemory as exc:
            answer = {"k": "move_failed", "what": what, "error": exc.to_wire()}
        self.link.post({**answer, **self.device_bytes()}, keep=True)

    # ---- guests ----

    def admit(self, m: dict[str, Any]) -> None:
        """A guest comes. Its arguments may be wrong in ways only the model knows."""
        pid, work = m["pid"], Path(m["work"])
        _, records = whole_records(work / "stream")
        self.read_keys[pid] = {r["key"] for r in records if r["kind"] == "input"}
        self.rows[pid] = m.get("row", b"")
        self.guests.add(pid)
        self.streams[pid] = Stream(work / "stream")
        guest = self.program.guest_type(
            pid, m["program"], m["args"], tuple(m["rank"]), records, m["parked"], work
        )
        try:
            self.program.admit(self, guest)
        except LlmosError as exc:
            self._end_guest(pid, 1, line_of(exc.to_wire()), {"error": exc.to_wire()})

    def give(self, pid: int, message: dict[str, Any], key: str) -> None:
        """Input for a guest. What is in its stream, an engine that dies leaves to the next."""
        if pid not in self.guests:
            return
        if key in self.read_keys[pid]:
            if pid in self.waiting:  # whoever sent it took it for work
                self.link.post({"k": "guest_idle", "pid": pid, "seen": self.seen}, keep=True)
            return
        self.read_keys[pid].add(key)
        self.waiting.discard(pid)
        self.emit("input", pid=pid, key=key, message=message)
        self.program.message(self, pid, message)

    def _end_guest(self, pid: int, status: int, reason: str, result: dict[str, Any]) -> None:
        done = {"k": "guest_done", "pid": pid, "status": status, "reason": reason,
                "result": result, "row": self.rows.get(pid, b"")}  # fmt: skip
        stream = self.streams.get(pid)
        if stream is not None and stream.behind and not stream.flush():
            # Who hears of the end must find all that was said before it.
            del self.streams[pid]
            self.unsaid[pid] = (stream, done)
        self._close_guest(pid)
        self._flush_marks(pid)
        if pid not in self.unsaid:
            self.link.post(done, keep=True)

    def _close_guest(self, pid: int) -> None:
        self.guests.discard(pid)
        self.waiting.discard(pid)
        self.read_keys.pop(pid, None)
        self.rows.pop(pid, None)
        stream = self.streams.pop(pid, None)
        if stream is not None:
            stream.close()

    def _flush_marks(self, *pids: int) -> None:
        """Readers must have heard of the last record before they hear of the end."""
        for pid in pids or tuple(self.marks):
            self.marks.discard(pid)
            self.link.post({"k": "mark", "pid": pid})


def stop_in_order(number: int, frame: object) -> None:
    """Wherever the program is: what it has to say of its end it says in `close`."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends it at once
    raise Stopped


def main(order: dict[str, Any], listener: socket.socket, team: Team) -> int:
    try:
        return Worker(order, listener, team).run()
    finally:
        team.end()
