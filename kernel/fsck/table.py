"""Check the journal: the file as SQLite sees it, and each row in it."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from llmos.kernel import database
from llmos.kernel.database import Row
from llmos.kernel.fsck import salvage
from llmos.kernel.fsck.report import Report
from llmos.kernel.home import Home
from llmos.kernel.journal import LAST_PID, LOST_AND_FOUND
from llmos.kernel.process import Process
from llmos.kernel.rows import DamagedRow, Worker, pack_row, unpack

Held = tuple[int, bytes, Process, Worker]  # seq, row, what it says


@dataclass
class Table:
    """What the journal says, as far as it can be known."""

    rows: dict[int, Held] = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)  # pid -> why it has no row any more
    last_pid: int = 0
    damaged: str = ""  # what is wrong with the file as a whole
    changed: bool = False

    def process(self, pid: int) -> Process | None:
        return self.rows[pid][2] if pid in self.rows else None

    def worker(self, pid: int) -> Worker:
        return self.rows[pid][3] if pid in self.rows else {}

    def change(self, pid: int) -> None:
        """A process was changed in place: its row is packed anew."""
        seq = max(held[0] for held in self.rows.values()) + 1
        _, _, proc, worker = self.rows[pid]
        self.rows[pid] = (seq, pack_row(proc, worker, seq), proc, worker)
        self.changed = True

    def packed(self) -> list[Row]:
        return [(pid, held[2].ended_at, held[1]) for pid, held in sorted(self.rows.items())]


def check(home: Home, report: Report) -> Table:
    """Raises HomeUnusable when a newer llmos wrote it: then nothing is touched."""
    aside = home.path / LOST_AND_FOUND
    if database.made(home.journal).exists():
        report.found(
            home.journal.name, "a repair of it was not finished", "it was finished",
            lambda: database.finish(home.journal, aside),
        )  # fmt: skip
    table = _read(home)
    for left in home.path.glob(database.in_the_making(home.journal).name + "*"):
        report.found(left.name, "a journal in the making was left", "removed", left.unlink)
    if table.damaged:
        report.found(
            home.journal.name, f"the database is damaged ({table.damaged})",
            f"{len(table.rows)} rows were recovered into a new one, the old is in {LOST_AND_FOUND}",
            lambda: write(home, table),
        )  # fmt: skip
    written: list[bool] = []

    def write_once() -> None:
        if not written and not table.damaged:
            write(home, table)
            written.append(True)

    for pid, why in sorted(table.lost.items()):
        if pid in table.rows:
            what = f"the row of process {pid} is damaged ({why})"
            repair = "an older copy of it was taken"
        else:
            what = f"the row of process {pid} is damaged ({why}), and there is no older copy"
            repair = f"it was taken out; the old journal is in {LOST_AND_FOUND}"
        report.found(home.journal.name, what, repair, write_once)
    return table


def write(home: Home, table: Table) -> None:
    """Put the table into the home as its journal, in one step. Raises OSError."""
    meta = [(LAST_PID, str(max([table.last_pid, *table.rows, *table.lost])))]
    try:
        database.write_anew(home.journal, table.packed(), meta, home.path / LOST_AND_FOUND)
    except sqlite3.Error as exc:
        raise OSError(0, database.describe(exc)) from None
    table.changed = False


def _read(home: Home) -> Table:
    """Looks at a copy: opening the file itself may change it."""
    path = home.journal
    wal = path.with_name(path.name + "-wal")
    kept = path.with_name(path.name + database.KEPT)
    wal = kept if kept.exists() and not wal.exists() else wal
    if not path.exists() and not wal.exists():
        return Table(damaged="it is gone" if _has_processes(home) else "")
    with tempfile.TemporaryDirectory(prefix="llmos-fsck-") as folder:
        copy = Path(folder, "journal.db")
        for end in ("", "-wal", "-journal"):
            part = wal if end == "-wal" else path.with_name(path.name + end)
            if part.exists():
                shutil.copyfile(part, copy.with_name(copy.name + end))
        table = Table(damaged="" if path.exists() else "it is gone")
        if not table.damaged:
            _read_rows(copy, table)
        try:
            database.check_header(path)  # SQLite may see another first page, in the log
        except sqlite3.Error as exc:
            table.damaged = table.damaged or str(exc)
        if not table.damaged and salvage.log_is_damaged(_bytes(wal)):
            table.damaged = "its log cannot be read to its end"
    if table.damaged or table.lost:
        found = salvage.rows_in(_bytes(path), _bytes(wal))
        for pid, held in found.items():
            known = table.rows.get(pid)
            wanted = pid in table.lost or bool(table.damaged)
            if wanted and (known is None or held[0] > known[0]):
                table.rows[pid] = held
        if table.damaged:
            table.lost = {pid: why for pid, why in table.lost.items() if pid not in table.rows}
    return table


def _has_processes(home: Home) -> bool:
    procs = home.path / "procs"
    return procs.is_dir() and any(p.name.isdigit() for p in procs.iterdir())


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _read_rows(copy: Path, table: Table) -> None:
    db = sqlite3.connect(copy, isolation_level=None)
    db.text_factory = lambda data: data.decode(errors="replace")
    try:
        database.check_format(db)
        said = [str(line) for (line,) in db.execute("PRAGMA integrity_check(3)")]
        if said != ["ok"]:
            table.damaged = "; ".join(said).replace("\n", " ")[:200]
        names = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
        if "process" in names:
            for pid, row in db.execute("SELECT pid, row FROM process ORDER BY pid"):
                _take(table, pid, row)
        elif names or _size(db):
            table.damaged = table.damaged or "it has no table of processes"
        if "meta" in names:
            for (value,) in db.execute("SELECT value FROM meta WHERE key = ?", (LAST_PID,)):
                table.last_pid = int(value) if str(value).isdigit() else 0
        if "aside" in names:
            for pid, why in db.execute("SELECT pid, why FROM aside"):
                table.lost[pid] = f"{why}; a kernel has set it aside"
    except sqlite3.Error as exc:
        table.damaged = table.damaged or database.describe(exc)
    finally:
        db.close()


def _size(db: sqlite3.Connection) -> int:
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    return int(pages)


def _take(table: Table, pid: int, row: object) -> None:
    try:
        if not isinstance(row, bytes):
            raise DamagedRow("it is no blob")
        proc, worker, seq = unpack(row)
        if proc.pid != pid:
            raise DamagedRow(f"it is of process {proc.pid}")
        table.rows[pid] = (seq, row, proc, worker)
    except DamagedRow as exc:
        table.lost[pid] = str(exc)
