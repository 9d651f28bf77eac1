"""The journal: what was acknowledged is on disk. SQLite, written by one thread.

Rows are whole processes (kernel/rows.py). Writers never wait for the disk; who has to know that
something is durable awaits `flushed()`, and everything queued meanwhile goes into the same commit.
When the disk takes nothing (full, read-only, failing) the rows wait here and are tried again by a
timer; a file that is damaged or gone is written anew from the table that the kernel has.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from llmos.kernel import database
from llmos.kernel.database import Lost, Row
from llmos.kernel.errors import HomeUnusable, LlmosError
from llmos.kernel.process import Process, Role
from llmos.kernel.rows import DamagedRow, Worker, pack_row, unpack

# A disk that took nothing is tried again after so long, whether or not anybody asks.
RETRY_S = 1.0

LOST_AND_FOUND = "lost+found"
LAST_PID = "last_pid"

_FORGET = "DELETE FROM process WHERE pid = ?"
_LAST_PID = (
    "INSERT INTO meta VALUES ('last_pid', ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value"
    " WHERE CAST(excluded.value AS INTEGER) > CAST(value AS INTEGER)"
)


@dataclass(slots=True)
class _Work:
    """What goes to the thread: rows to write (None: to forget), who waits, a whole table."""

    rows: list[tuple[int, Row | None]] = field(default_factory=list)
    done: asyncio.Future[None] | None = None
    whole: list[Row] | None = None
    last: bool = False


def journaled(proc: Process) -> bool:
    """An attached generation is known to its engine and its client only; a service is made anew
    at each boot."""
    attached = proc.role is Role.GUEST and proc.attached and proc.live
    return proc.role is not Role.SERVICE and not attached


class Journal:
    def __init__(self, path: Path, network: bool = False) -> None:
        self._path, self._network = path, network
        self._queue: queue.SimpleQueue[_Work] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="journal", daemon=True)
        self._unwritten: dict[int, Row | None] = {}  # kept until the disk takes it
        self._whole: list[Row] | None = None
        self._db: sqlite3.Connection | None = None
        self._inode = 0
        self._seq = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        # Called in the loop: something has changed in `failed`; and the file must be made anew.
        self.on_change: Callable[[], None] = lambda: None
        self.on_lost: Callable[[], None] = lambda: None
        # A row that no database takes (pid, why): it is left out, and the others are written.
        self.on_refused: Callable[[int, str], None] = lambda pid, why: None
        self.mode = "truncate" if network else "wal"
        self.failed: str = ""
        self.aside: dict[int, str] = {}  # pid -> why its row could not be read
        self.last_pid = 0  # at least this one was given away
        self.commits = 0
        self.rows = 0

    # ---- opening ----

    def open(self) -> list[tuple[Process, Worker]]:
        """-> every kept process with its worker's row ({} when it had none), by pid.

        A row that cannot be read is set aside in the file, and named in `aside`. Raises
        HomeUnusable; then nothing has been changed.
        """
        with contextlib.suppress(RuntimeError):  # a test may only want to look
            self._loop = asyncio.get_running_loop()
        self._check_it_is_there()
        try:
            database.finish(self._path, self._path.parent / LOST_AND_FOUND)
            database.check_header(self._path)
            with database.log_kept(self._path):
                found = self._load()
        except (sqlite3.Error, OSError) as exc:
            hint = ""
            if isinstance(exc, sqlite3.Error) and database.is_damage(exc):
                hint = "`llmos fsck --repair` recovers what can be read"
            raise HomeUnusable(
                f"the journal {self._path} cannot be used: {database.describe(exc)}", hint
            ) from None
        self._thread.start()
        return found

    def _check_it_is_there(self) -> None:
        """Raises HomeUnusable when it was lost: a new one would make everybody's work nobody's."""
        if self._path.exists() and self._path.stat().st_size:
            return
        left = [p for p in self._path.parent.glob("procs/*") if (p / "checkpoints").is_dir()]
        if left:
            what = "empty" if self._path.exists() else "missing"
            raise HomeUnusable(
                f"the journal {self._path} is {what}, and {len(left)} processes have left "
                "checkpoints",
                "`llmos fsck --repair` puts them into lost+found; then it boots",
            )

    def _load(self) -> list[tuple[Process, Worker]]:
        db = database.look(self._path, self._network)
        try:
            found, broken = self._read(db)  # all of it, before the first write
            database.settle(db, self._network)
            self._put_aside(db, broken)
        finally:
            db.close()
        return found

    def _read(
        self, db: sqlite3.Connection
    ) -> tuple[list[tuple[Process, Worker]], dict[int, tuple[str, bytes]]]:
        """Raises NewerRow before anything has been written."""
        database.check_format(db)
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
        found: list[tuple[Process, Worker]] = []
        broken: dict[int, tuple[str, bytes]] = {}
        if "process" in tables:
            for pid, row in db.execute("SELECT pid, row FROM process ORDER BY pid"):
                try:
                    proc, worker, seq = unpack(row)
                    if proc.pid != pid:
                        raise DamagedRow(f"it is of process {proc.pid}")
                except DamagedRow as exc:
                    broken[pid] = (str(exc), row)
                    continue
                self._seq = max(self._seq, seq)
                found.append((proc, worker))
        if "meta" in tables:
            for (value,) in db.execute("SELECT value FROM meta WHERE key = ?", (LAST_PID,)):
                self.last_pid = int(value) if str(value).isdigit() else 0
        if "aside" in tables:
            self.aside = {p: str(why) for p, why in db.execute("SELECT pid, why FROM aside")}
        return found, broken

    def _put_aside(self, db: sqlite3.Connection, broken: dict[int, tuple[str, bytes]]) -> None:
        """One row that cannot be read must not keep the others from being used."""
        db.executescript(database.SCHEMA)
        db.execute(f"PRAGMA user_version={database.FORMAT}")
        db.execute("BEGIN IMMEDIATE")
        for pid, (why, row) in broken.items():
            db.execute("INSERT OR REPLACE INTO aside VALUES (?, ?, ?, ?)",
                       (pid, time.time(), why, row))  # fmt: skip
            db.execute(_FORGET, (pid,))
            self.aside[pid] = why
        db.execute("COMMIT")
        self.last_pid = max([self.last_pid, *self.aside])

    # ---- what the kernel calls ----

    def save(self, proc: Process, worker: Worker) -> None:
        self._queue.put(_Work([(proc.pid, self._row(proc, worker))]))
        self.rows += 1

    def forget(self, pid: int) -> None:
        self._queue.put(_Work([(pid, None)]))

    async def flushed(self) -> None:
        """Return when everything so far is on the disk. Raises HomeUnusable when it cannot be."""
        done = asyncio.get_running_loop().create_future()
        self._queue.put(_Work(done=done))
        await done

    def write_anew(self, table: list[tuple[Process, Worker]]) -> None:
        """The whole table, in answer to `on_lost`."""
        self._queue.put(_Work(whole=[self._row(proc, worker) for proc, worker in table]))

    def close(self) -> None:
        """Write what is left."""
        if self._thread.is_alive():
            self._queue.put(_Work(last=True))
            self._thread.join(timeout=10)

    def _row(self, proc: Process, worker: Worker) -> Row:
        self._seq += 1
        return proc.pid, proc.ended_at, pack_row(proc, worker, self._seq)

    # ---- the thread ----

    def _write(self) -> None:
        last = False
        while not last:
            batch = []
            with contextlib.suppress(queue.Empty):
                batch.append(self._queue.get(timeout=RETRY_S if self.failed else None))
                while True:
                    batch.append(self._queue.get_nowait())
            last = any(work.last for work in batch)
            self._commit(batch)
        self._disconnect()

    def _commit(self, batch: list[_Work]) -> None:
        """One commit for all that is queued, then the answers."""
        for work in batch:
            # Each row is a whole process: the last one of a pid is enough.
            self._unwritten.update(work.rows)
            self._whole = work.whole if work.whole is not None else self._whole
        before = self.failed
        try:
            self._write_rows()
            self.failed = ""
        except (sqlite3.Error, OSError, Lost) as exc:
            self._disconnect()
            self.failed = f"the journal cannot be written: {database.describe(exc)}"
            if database.is_damage(exc) and self._whole is None:
                self._tell(self.on_lost)
        error: LlmosError | None = None
        if self.failed:
            error = HomeUnusable(self.failed, "`llmos status` says when it is well again")
        if self.failed != before:
            self._tell(self.on_change)
        waiting = [work.done for work in batch if work.done is not None]
        if waiting:
            self._tell(lambda: _resolve(waiting, error))

    def _write_rows(self) -> None:
        if self._whole is not None:
            self._disconnect()
            aside = self._path.parent / LOST_AND_FOUND
            meta = [(LAST_PID, str(max([self.last_pid, *(pid for pid, *_ in self._whole)])))]
            self._tell_refused(database.write_anew(self._path, self._whole, meta, aside))
            self._whole, self._inode = None, 0
        if not self._unwritten and not self.failed:
            return
        db = self._connected()
        saved = [row for row in self._unwritten.values() if row is not None]
        gone = [(pid,) for pid, row in self._unwritten.items() if row is None]
        db.execute("BEGIN IMMEDIATE")
        refused = database.save_rows(db, saved)
        if gone:
            db.executemany(_FORGET, gone)
            # Its number is not given away again, though nothing else knows of it.
            db.execute(_LAST_PID, (str(max(gone)[0]),))
        if not self._unwritten:  # is it well again? Only a write tells
            db.execute("INSERT OR REPLACE INTO meta VALUES ('tried', ?)", (str(time.time()),))
        db.execute("COMMIT")
        self.commits += 1
        self._unwritten.clear()
        self._tell_refused(refused)

    def _tell_refused(self, refused: dict[int, str]) -> None:
        for pid, why in refused.items():
            self._tell(functools.partial(self.on_refused, pid, why))

    def _connected(self) -> sqlite3.Connection:
        """Raises Lost: in WAL mode SQLite writes on into a file that was deleted long ago."""
        try:
            inode = os.stat(self._path).st_ino
        except FileNotFoundError:
            raise Lost(f"{self._path.name} is gone") from None
        if self._db is None:
            self._db = database.connect(self._path, self._network)
            self._inode = self._inode or inode
        if inode != self._inode:
            raise Lost(f"{self._path.name} was replaced by another file")
        return self._db

    def _disconnect(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            with contextlib.suppress(sqlite3.Error):
                db.close()

    def _tell(self, what: Callable[[], None]) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(what)


def _resolve(waiting: list[asyncio.Future[None]], error: LlmosError | None) -> None:
    for done in waiting:
        if done.done():
            continue
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)
