"""The worker: an OS process that runs one program, step by step, under the kernel's orders.

Between two steps it reads its messages: checkpoint, stop, guests. A hold needs no message (it
is a signal that stops the whole process). Knows no program; it is given an entry point.
"""

from __future__ import annotations

import json
import os
import queue
import random
import socket
import time
import traceback
from pathlib import Path
from typing import Any

from llmos.drivers.worker import checkpoint
from llmos.drivers.worker.link import Link
from llmos.drivers.worker.programs import build_args, load_program
from llmos.drivers.worker.stream import Stream, whole_records
from llmos.kernel.errors import LlmosError, TimedOut, from_wire

# A training that asks for no interval of its own loses at most this much to a crash.
CHECKPOINT_S = 60.0

# A kernel dials its workers at once; after so long none ever will.
DIALLED_S = 120.0

# How long a service may take to answer, in seconds that the worker is not held for: it waits in
# pieces, and a hold, however long, costs no more than the piece it falls into.
CALL_S = 120.0
CALL_PIECE_S = 1.0

# How long a worker that has ended waits for the kernel to have heard of it.
LAST_WORDS_S = 5.0


class Stopped(Exception):
    """The worker is to end at this safepoint."""


class Worker:
    """The loop, and the Context that the program sees."""

    def __init__(self, order: dict[str, Any], listener: socket.socket) -> None:
        self.program: Any = None
        self.loaded = False
        self.step = 0
        self.streams: dict[int, Stream] = {}
        self.marks: set[int] = set()
        self.guests: set[int] = set()
        self.waiting: set[int] = set()  # guests that wait for input
        self.seen = 0
        self.checkpoint_wanted = False
        self.stop_wanted = False
        self.later: list[dict[str, Any]] = []
        self.calls = 0
        self.in_step = False
        # Context
        self.pid = 0
        self.home = Path(order["home"])
        self.work = Path(order["folder"])
        self.device = "cpu"
        self.threads = 1
        self.link = Link(listener, order["worker_id"], order.get("secret", ""), self.hello)

    def hello(self) -> dict[str, Any]:
        return {
            "loaded": self.loaded,
            "step": self.step,
            "pid": self.pid,
            "guests": list(self.guests),
            "waiting": list(self.waiting),
            "seen": self.seen,
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

    def call(self, method: str, **arguments: Any) -> Any:
        self.calls += 1
        number = self.calls
        self.link.post({"k": "call", "id": number, "method": method, "args": arguments}, keep=True)
        pieces = round(CALL_S / CALL_PIECE_S)
        while True:
            try:
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
            self.load(self.await_load())
            while True:
                self.obey(wait=False)
                self.in_step = True
                try:
                    outcome = self.program.step(self)
                finally:
                    self.in_step = False
                done = self.after_step(outcome)
                if done is not None:
                    return self.finish(done.status, done.reason, done.result)
        except Stopped:
            return 0
        except LlmosError as exc:
            hint = f" ({exc.hint})" if exc.hint else ""
            return self.finish(1, exc.message + hint, {"error": exc.to_wire()})
        except MemoryError:
            traceback.print_exc()
            return self.finish(1, "out of memory: ask for less (batch, context, width)", {})
        except Exception as exc:  # noqa: BLE001  whatever a program raises ends its process alone
            traceback.print_exc()
            text = str(exc).splitlines()[0] if str(exc) else ""
            return self.finish(1, f"{type(exc).__name__}: {text}", {"traceback": "in its log"})

    def await_load(self) -> dict[str, Any]:
        """What to run; a worker that no kernel ever dials was lost in its birth, and ends."""
        while True:
            try:
                message = self.link.inbox.get(timeout=DIALLED_S)
            except queue.Empty:
                if not self.link.met:
                    raise Stopped from None
                continue
            if message["k"] == "load":
                return message
            self.later.append(message)

    def load(self, m: dict[str, Any]) -> None:
        import torch

        self.pid, self.work = m["pid"], Path(m["work"])
        self.device, self.threads = m["device"], m["threads"]
        self.interval_s = float(m.get("checkpoint_s") or CHECKPOINT_S)
        self.streams[self.pid] = Stream(self.work / "stream")
        torch.set_num_threads(self.threads)
        seed = int.from_bytes(os.urandom(7), "big")  # a fork must not repeat its siblings' luck
        random.seed(seed)
        torch.manual_seed(seed)
        cls = load_program(m["entry"])
        self.program = cls(build_args(cls, m["args"]))
        self.program.load(self)
        if cls.has_checkpoint:
            self.restore()
        self.loaded = True
        self.saved_at = time.monotonic()
        self.link.post({"k": "loaded"}, keep=True)

    def restore(self) -> None:
        folder = checkpoint.newest(
            self.work / "checkpoints", lambda text: self.emit("note", text=text)
        )
        if folder is None:
            return
        self.program.restore(folder)
        self.step = int(folder.name.removeprefix("step-"))
        self.emit("restored", step=self.step)

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
        self.step = outcome.step
        if not outcome.shares:
            self.streams[self.pid].append(
                "progress",
                {"step": outcome.step, "total": outcome.total, "metrics": outcome.metrics},
            )
            self.marks.add(self.pid)
        self.link.post(
            {"k": "report", "step": outcome.step, "total": outcome.total,
             "metrics": outcome.metrics, "shares": outcome.shares, "marks": list(self.marks)}
        )  # fmt: skip
        self.marks.clear()
        every = getattr(self.program.args, "save_every", 0)  # steps; a program may offer it
        due = (
            self.step % every == 0 if every else time.monotonic() - self.saved_at > self.interval_s
        )
        if self.program.has_checkpoint and (due or self.checkpoint_wanted or self.stop_wanted):
            self.save()
        if self.stop_wanted:
            raise Stopped
        return None

    def save(self) -> None:
        folder = checkpoint.write(self.work / "checkpoints", self.step, self.program.save)
        self.checkpoint_wanted = False
        self.saved_at = time.monotonic()
        self.link.post({"k": "checkpointed", "folder": str(folder), "step": self.step}, keep=True)

    def finish(self, status: int, reason: str, result: dict[str, Any]) -> int:
        """The last words: on disk first, for a kernel that comes later, then over the line."""
        self._flush_marks()
        end = {"status": status, "reason": reason, "result": result}
        aside = self.work / ".result.json"
        aside.write_text(json.dumps(end))
        aside.rename(self.work / "result.json")
        self.link.post({"k": "done", **end}, keep=True)
        deadline = time.monotonic() + LAST_WORDS_S
        while self.link.kept() and time.monotonic() < deadline:
            time.sleep(0.002)
        return status

    # ---- orders ----

    def obey(self, wait: bool) -> None:
        """Handle what the kernel said; with `wait` at least one message."""
        while self.later:
            self.take(self.later.pop(0))
            wait = False
        while True:
            try:
                self.take(self.link.inbox.get(block=wait))
            except queue.Empty:
                return
            wait = False

    def take(self, m: dict[str, Any]) -> None:
        match m["k"]:
            case "stop":
                self.stop_wanted = True
                if not self.program.has_checkpoint:
                    raise Stopped
                if self.step:
                    self.save()
                    raise Stopped
            case "checkpoint":
                self.checkpoint_wanted = True
                if self.step:
                    self.save()
            case "lease":
                self.program.floor(m["floor"])
            case "admit":
                self.seen += 1
                self.admit(m)
            case "drop":
                self.seen += 1
                self._close_guest(m["pid"])
                self.program.drop(self, m["pid"])
            case "rank":
                self.program.rank(self, m["pid"], tuple(m["rank"]), m["parked"])
            case "input":
                self.seen += 1
                if m["pid"] in self.guests:
                    self.waiting.discard(m["pid"])
                    self.program.message(self, m["pid"], m["message"])

    def admit(self, m: dict[str, Any]) -> None:
        """A guest comes. Its arguments may be wrong in ways only the model knows."""
        pid, work = m["pid"], Path(m["work"])
        _, records = whole_records(work / "stream")
        sent = sum(len(r.get("tokens", ())) for r in records if r["kind"] == "text")
        self.guests.add(pid)
        self.streams[pid] = Stream(work / "stream")
        guest = self.program.guest_type(
            pid, m["program"], m["args"], tuple(m["rank"]), sent, m["parked"]
        )
        try:
            self.program.admit(self, guest)
        except LlmosError as exc:
            hint = f" ({exc.hint})" if exc.hint else ""
            self._end_guest(pid, 1, exc.message + hint, {"error": exc.to_wire()})

    def _end_guest(self, pid: int, status: int, reason: str, result: dict[str, Any]) -> None:
        self._close_guest(pid)
        self._flush_marks(pid)
        done = {"k": "guest_done", "pid": pid, "status": status, "reason": reason}
        self.link.post({**done, "result": result}, keep=True)

    def _close_guest(self, pid: int) -> None:
        self.guests.discard(pid)
        self.waiting.discard(pid)
        stream = self.streams.pop(pid, None)
        if stream is not None:
            stream.close()

    def _flush_marks(self, *pids: int) -> None:
        """Readers must have heard of the last record before they hear of the end."""
        for pid in pids or tuple(self.marks):
            self.marks.discard(pid)
            self.link.post({"k": "mark", "pid": pid})


def main(order: dict[str, Any], listener: socket.socket) -> int:
    return Worker(order, listener).run()
