"""The guests of an engine: who is in this worker, what they were given, and how they end.

What a guest has read is known by its stream, so that an engine which dies leaves it to the next;
a guest that only this engine knows brings its row, for a kernel that comes later.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmos.drivers.worker.records import Post, Records
from llmos.drivers.worker.stream import whole_records
from llmos.drivers.worker.words import line_of
from llmos.kernel.errors import BadInput, LlmosError

if TYPE_CHECKING:
    from llmos.drivers.worker.main import Worker


class Guests:
    def __init__(self, worker: Worker, records: Records, post: Post) -> None:
        self._worker, self._records, self._post = worker, records, post
        self._here: set[int] = set()
        self._waiting: set[int] = set()  # for input
        self._read_keys: dict[int, set[str]] = {}  # by guest: the inputs that it has had
        self._rows: dict[int, bytes] = {}  # by guest: its row, for a kernel that comes later
        self._seen = 0  # how many messages about guests were read

    def hello(self) -> dict[str, Any]:
        """What a kernel that dials has to know."""
        return {
            "guests": [*self._here, *self._records.unsaid],
            "rows": {pid: row for pid, row in self._rows.items() if row},
            "waiting": list(self._waiting),
            "seen": self._seen,
        }

    # ---- what the kernel says ----

    def take(self, m: dict[str, Any]) -> None:
        """An order about a guest."""
        program = self._worker.program
        match m["k"]:
            case "admit":
                self._seen += 1
                self._admit(m)
            case "drop":
                self._seen += 1
                self._leave(m["pid"])
                self._records.forget(m["pid"])
                program.drop(self._worker, m["pid"])
            case "rank":
                if m["pid"] in self._here:  # else it has ended meanwhile
                    self._rows[m["pid"]] = m.get("row", b"")
                program.rank(self._worker, m["pid"], tuple(m["rank"]), m["parked"])
            case "input":
                self._seen += 1
                self._give(m["pid"], m["message"], m.get("key", ""))

    def _admit(self, m: dict[str, Any]) -> None:
        """A guest comes. Its arguments may be wrong in ways only the model knows."""
        pid, work = m["pid"], Path(m["work"])
        _, records = whole_records(work / "stream")
        self._read_keys[pid] = {r["key"] for r in records if r["kind"] == "input"}
        self._rows[pid] = m.get("row", b"")
        self._here.add(pid)
        self._records.open(pid, work)
        program = self._worker.program
        guest = program.guest_type(
            pid, m["program"], m["args"], tuple(m["rank"]), records, m["parked"], work
        )
        try:
            program.admit(self._worker, guest)
        except Exception as exc:  # noqa: BLE001  one guest's arguments end nobody else
            self._fail(pid, exc)

    def _fail(self, pid: int, exc: Exception) -> None:
        """What the engine makes of a guest's words ends that guest alone."""
        if not isinstance(exc, LlmosError):
            traceback.print_exc()
            exc = BadInput(f"the engine failed with it: {type(exc).__name__}: {exc}"[:300])
        self._worker.program.drop(self._worker, pid)
        self.end(pid, 1, line_of(exc.to_wire()), {"error": exc.to_wire()})

    def _give(self, pid: int, message: dict[str, Any], key: str) -> None:
        """Input for a guest. What is in its stream, an engine that dies leaves to the next."""
        if pid not in self._here:
            return
        if key in self._read_keys[pid]:
            if pid in self._waiting:  # whoever sent it took it for work
                self._post(self._idle(pid), keep=True)
            return
        self._read_keys[pid].add(key)
        self._waiting.discard(pid)
        self._records.add(pid, "input", {"key": key, "message": message})
        try:
            self._worker.program.message(self._worker, pid, message)
        except Exception as exc:  # noqa: BLE001  as above
            self._fail(pid, exc)

    # ---- what the engine says ----

    def idle_report(self) -> dict[str, Any]:
        """No guest has anything to do."""
        return {"k": "idle", "seen": self._seen}

    def waits(self, pid: int) -> None:
        """A guest waits for input."""
        self._records.tell_marks(pid)
        self._waiting.add(pid)
        self._post(self._idle(pid), keep=True)

    def end(self, pid: int, status: int, reason: str, result: dict[str, Any]) -> None:
        done = {"k": "guest_done", "pid": pid, "status": status, "reason": reason,
                "result": result, "row": self._rows.get(pid, b"")}  # fmt: skip
        self._records.put_off(pid, done)
        self._leave(pid)
        self._records.end(pid, done)

    def _idle(self, pid: int) -> dict[str, Any]:
        return {"k": "guest_idle", "pid": pid, "seen": self._seen}

    def _leave(self, pid: int) -> None:
        self._here.discard(pid)
        self._waiting.discard(pid)
        self._read_keys.pop(pid, None)
        self._rows.pop(pid, None)
