"""The file of the journal: how it is opened, made anew, and what its errors mean.

On a local disk SQLite writes ahead (WAL) and a commit is one sync of the log. On a network disk
there is no WAL: a rollback journal is truncated at each commit, which costs a few syncs more.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path

from llmos.kernel.errors import HomeUnusable

# Of the file as a whole, in SQLite's user_version. 0: written before there was such a number.
FORMAT = 1

SCHEMA = """
CREATE TABLE IF NOT EXISTS process (pid INTEGER PRIMARY KEY, ended REAL, row BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS aside (pid INTEGER PRIMARY KEY, at REAL, why TEXT, row BLOB);
"""

Row = tuple[int, float | None, bytes]  # pid, when it ended, the row

_SAVE = "INSERT OR REPLACE INTO process (pid, ended, row) VALUES (?, ?, ?)"

HEADER = b"SQLite format 3\0"
KEPT = "-wal.kept"

# Files that belong to a database, beside itself.
BESIDE = ("-wal", "-shm", "-journal")

_MEANING = {
    "SQLITE_FULL": "the disk is full",
    "SQLITE_READONLY": "the disk is read-only",
    "SQLITE_CORRUPT": "the database is damaged",
    "SQLITE_NOTADB": "the database is damaged",
    "SQLITE_CANTOPEN": "the file cannot be opened",
    "SQLITE_IOERR": "the disk fails",
    "SQLITE_BUSY": "another program holds the database",
}


class Lost(Exception):
    """The file is not there any more, or another one is in its place."""


@contextlib.contextmanager
def log_kept(path: Path) -> Iterator[None]:
    """A log (-wal) that is there stays when what is done inside fails: SQLite removes that of a
    file in which it finds no database, and with it the newest rows."""
    wal, kept = path.with_name(path.name + "-wal"), path.with_name(path.name + KEPT)
    if kept.exists() and not wal.exists():
        kept.rename(wal)  # somebody died in here
    kept.unlink(missing_ok=True)
    if wal.exists():
        try:
            os.link(wal, kept)
        except OSError:  # a file system without links
            shutil.copyfile(wal, kept)
    try:
        yield
    except BaseException:
        if kept.exists() and (not wal.exists() or not wal.stat().st_size):
            kept.rename(wal)
        raise
    finally:
        kept.unlink(missing_ok=True)


def check_header(path: Path) -> None:
    """Raises sqlite3.DatabaseError for what is surely no database, without opening it."""
    try:
        with path.open("rb") as f:
            begins = f.read(len(HEADER))
    except FileNotFoundError:
        return
    if begins not in (HEADER, b""):
        raise sqlite3.DatabaseError("file is not a database")


def connect(path: Path, network: bool = False) -> sqlite3.Connection:
    """A connection on which commits are durable. Raises sqlite3.Error."""
    db = look(path, network)
    try:
        settle(db, network)
    except BaseException:
        db.close()
        raise
    return db


def look(path: Path, network: bool = False) -> sqlite3.Connection:
    """A connection that has changed nothing yet. Raises sqlite3.Error."""
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    if network:
        # Before the first look: an older WAL is then read without shared memory.
        db.execute("PRAGMA locking_mode=EXCLUSIVE")
    return db


def settle(db: sqlite3.Connection, network: bool) -> None:
    db.execute(f"PRAGMA journal_mode={'TRUNCATE' if network else 'WAL'}")
    db.execute("PRAGMA synchronous=FULL")  # a commit is a sync of the log


def describe(exc: Exception) -> str:
    """An error of the database or of its disk, in a few words."""
    if isinstance(exc, Lost):
        return str(exc)
    if isinstance(exc, OSError):
        return exc.strerror or str(exc)
    name = getattr(exc, "sqlite_errorname", "") or ""
    for known, words in _MEANING.items():
        if name.startswith(known):
            return words if str(exc) in words else f"{words} ({exc})"
    if "file is not a database" in str(exc) or "malformed" in str(exc):
        return f"the database is damaged ({exc})"
    return str(exc)


def is_damage(exc: Exception) -> bool:
    """No waiting makes it better: the file has to be written anew."""
    if isinstance(exc, Lost):
        return True
    name = getattr(exc, "sqlite_errorname", "") or ""
    damaged = name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB"))
    return damaged or "file is not a database" in str(exc)


def is_full(exc: OSError) -> bool:
    return exc.errno in (errno.ENOSPC, errno.EDQUOT)


# ---- making it anew ----


def in_the_making(path: Path) -> Path:
    return path.with_name(path.name + ".new")


def made(path: Path) -> Path:
    """A database that is whole and only has to be put in its place."""
    return path.with_name(path.name + ".repaired")


def save_rows(db: sqlite3.Connection, rows: list[Row]) -> dict[int, str]:
    """In a transaction -> by pid, the rows that no database takes, and why. All others are in."""
    try:
        db.executemany(_SAVE, rows)
        return {}
    except (sqlite3.DataError, OverflowError):
        pass  # one of them: they are tried one by one
    refused: dict[int, str] = {}
    for row in rows:
        try:
            db.execute(_SAVE, row)
        except (sqlite3.DataError, OverflowError) as exc:
            refused[row[0]] = f"{exc}; it has {len(row[2]):,} bytes"
    return refused


def write_anew(
    path: Path, rows: Iterable[Row], meta: Iterable[tuple[str, str]], aside: Path
) -> dict[int, str]:
    """Put a database with these rows in the place of `path`; what was there lies in `aside` then
    -> the rows that it does not take (`save_rows`).

    At any moment of a crash there is the old one, or the new one, or both with the new one whole:
    `finish` (at every open) then goes on where it was. Raises sqlite3.Error, OSError.
    """
    new = in_the_making(path)
    for old in (new, *(new.with_name(new.name + end) for end in BESIDE)):
        old.unlink(missing_ok=True)
    db = sqlite3.connect(new, isolation_level=None)
    try:
        db.execute("PRAGMA journal_mode=DELETE")
        db.execute("PRAGMA synchronous=FULL")
        db.executescript(SCHEMA)
        db.execute("BEGIN")
        refused = save_rows(db, list(rows))
        db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", meta)
        db.execute("COMMIT")
        db.execute(f"PRAGMA user_version={FORMAT}")
    finally:
        db.close()
    sync(new)
    new.rename(made(path))
    sync(path.parent)
    finish(path, aside)
    return refused


def finish(path: Path, aside: Path) -> bool:
    """If a new database was made, put it in its place -> whether there was one. Idempotent."""
    if not made(path).exists():
        return False
    aside.mkdir(mode=0o700, parents=True, exist_ok=True)
    # The log first: beside the new file it would be read into it.
    for end in ("", *BESIDE):
        old = path.with_name(path.name + end)
        if old.exists():
            old.rename(unused(aside / old.name))
    sync(aside)
    sync(path.parent)
    made(path).rename(path)
    sync(path.parent)
    return True


def unused(path: Path) -> Path:
    """This path, or with the first number behind it that is free."""
    found, number = path, 1
    while os.path.lexists(found):
        number += 1
        found = path.with_name(f"{path.name}.{number}")
    return found


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot sync a folder
            os.fsync(fd)
    finally:
        os.close(fd)


def check_format(db: sqlite3.Connection) -> None:
    """Raises HomeUnusable for a file of a version that is not known yet."""
    (found,) = db.execute("PRAGMA user_version").fetchone()
    if found > FORMAT:
        raise HomeUnusable(
            f"the journal has format {found}, this llmos knows {FORMAT}: a newer one wrote it, "
            "and nothing was changed",
            "start it with the newer llmos, or choose another folder with LLMOS_HOME",
        )
