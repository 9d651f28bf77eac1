"""The journal: what was acknowledged is on disk. SQLite in WAL mode, written by one thread.

Rows are whole processes, versioned MessagePack maps. Writers never wait for the disk; who has to
know that something is durable awaits `flushed()`, and everything queued meanwhile goes into the
same commit.
"""

from __future__ import annotations

import asyncio
import dataclasses
import queue
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import msgpack

from llmos.kernel.errors import HomeUnusable, LlmosError
from llmos.kernel.process import Class, Memory, Process, Residency, Role, State

ROW_VERSION = 1

_SCHEMA = """
CREATE TABLE IF NOT EXISTS process (pid INTEGER PRIMARY KEY, ended REAL, row BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""

# Ended processes are kept this long, or this many, whichever is more forgetful.
KEEP_S = 30 * 24 * 3600.0
KEEP_ROWS = 10_000

_Work = tuple[list[tuple[str, tuple[Any, ...]]], "asyncio.Future[None] | None"]


class Journal:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="journal", daemon=True)
        self.failed: str = ""
        self._unwritten: dict[int, tuple[str, tuple[Any, ...]]] = {}  # kept until the disk takes it
        self.commits = 0
        self.rows = 0

    def open(self) -> list[tuple[Process, dict[str, Any]]]:
        """-> every kept process with its worker's row ({} when it had none), by pid."""
        try:
            db = self._connect()
            db.executescript(_SCHEMA)
            db.execute(
                "DELETE FROM process WHERE ended IS NOT NULL AND (ended < ? "
                "OR pid <= (SELECT pid FROM process WHERE ended IS NOT NULL ORDER BY pid DESC "
                "LIMIT 1 OFFSET ?))",
                (time.time() - KEEP_S, KEEP_ROWS),
            )
            db.commit()
            found = [
                unpack_row(row) for (row,) in db.execute("SELECT row FROM process ORDER BY pid")
            ]
            db.close()
        except sqlite3.Error as exc:
            raise HomeUnusable(f"the journal {self._path} cannot be used: {exc}") from None
        self._thread.start()
        return found

    def save(self, proc: Process, worker: dict[str, Any]) -> None:
        row = pack_row(proc, worker)
        sql = "INSERT OR REPLACE INTO process (pid, ended, row) VALUES (?, ?, ?)"
        self._queue.put(([(sql, (proc.pid, proc.ended_at, row))], None))
        self.rows += 1

    def forget(self, pid: int) -> None:
        self._queue.put(([("DELETE FROM process WHERE pid = ?", (pid,))], None))

    async def flushed(self) -> None:
        """Return when everything so far is on the disk. Raises HomeUnusable when it cannot be."""
        done = asyncio.get_running_loop().create_future()
        self._queue.put(([], done))
        await done

    def close(self) -> None:
        """Write what is left."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join(timeout=10)

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")  # a commit is a sync of the log
        return db

    def _write(self) -> None:
        db = self._connect()
        while (first := self._queue.get()) is not None:
            batch = [first]
            while not self._queue.empty():
                item = self._queue.get()
                if item is None:
                    self._commit(db, batch)
                    db.close()
                    return
                batch.append(item)
            self._commit(db, batch)
        db.close()

    def _commit(self, db: sqlite3.Connection, batch: list[_Work]) -> None:
        """One commit for all that is queued, then the answers."""
        error: LlmosError | None = None
        # Each statement replaces a whole row: the last one of a pid is enough.
        self._unwritten |= {values[0]: (sql, values) for work, _ in batch for sql, values in work}
        if self._unwritten:
            try:
                db.execute("BEGIN IMMEDIATE")
                for sql, values in self._unwritten.values():
                    db.execute(sql, values)
                db.execute("COMMIT")
                self.commits += 1
                self.failed = ""
                self._unwritten.clear()
            except sqlite3.Error as exc:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                self.failed = f"the journal cannot be written: {exc}"
        if self.failed:
            error = HomeUnusable(self.failed, "is the disk of LLMOS_HOME full or read-only?")
        for _, done in batch:
            if done is not None:
                done.get_loop().call_soon_threadsafe(_resolve, done, error)


def _resolve(done: asyncio.Future[None], error: LlmosError | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)


def pack_row(proc: Process, worker: dict[str, Any]) -> bytes:
    body = {f.name: getattr(proc, f.name) for f in dataclasses.fields(proc)}
    body["memory"] = dataclasses.asdict(proc.memory)
    body["cls"] = int(proc.cls)
    for name in ("state", "residency", "role"):
        body[name] = str(body[name])
    return bytes(msgpack.packb({"v": ROW_VERSION, "process": body, "worker": worker}))


def unpack_row(row: bytes) -> tuple[Process, dict[str, Any]]:
    """A row of this or an older version. Fields that are not known any more are dropped."""
    value = msgpack.unpackb(row, strict_map_key=False)
    body = value["process"]
    known = {f.name for f in dataclasses.fields(Process)}
    body = {k: v for k, v in body.items() if k in known}
    body["memory"] = Memory(**body.get("memory", {}))
    body["cls"] = Class(body["cls"])
    body["state"] = State(body["state"])
    body["residency"] = Residency(body["residency"])
    body["role"] = Role(body["role"])
    body["story"] = [tuple(line) for line in body.get("story", [])]
    return Process(**body), value.get("worker", {})
