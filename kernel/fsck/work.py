"""Check the folders of processes: streams, checkpoints, last words; and rows that point there."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import struct
from pathlib import Path

from llmos.kernel import database
from llmos.kernel.errors import ProtocolError
from llmos.kernel.fsck.report import Report
from llmos.kernel.fsck.table import Table
from llmos.kernel.home import Home
from llmos.kernel.journal import LOST_AND_FOUND
from llmos.kernel.process import Process, Role
from llmos.kernel.wire import MAX_FRAME_BYTES, unpack

CHECKSUMS = "checksums.json"
REPLACED = ".replaced-"
_STEP = re.compile(r"step-\d+")
_HEADER = struct.Struct(">I")


class Folders:
    """`alive`: pids whose workers live on; what they may be writing is left alone."""

    def __init__(self, home: Home, table: Table, report: Report, alive: set[int]) -> None:
        self._home, self._table, self._report, self._alive = home, table, report, alive
        self._aside = home.path / LOST_AND_FOUND

    def check(self) -> None:
        procs = self._home.path / "procs"
        for folder in sorted(procs.iterdir()) if procs.is_dir() else ():
            if not folder.name.isdigit():
                continue
            pid = int(folder.name)
            if pid in self._alive:
                self._report.notes.append(f"process {pid} has a living worker: left alone")
            elif self._table.process(pid) is None:
                self._without_a_row(pid, folder)
            else:
                self._check_folder(pid, folder)
        for pid in sorted(self._table.rows):
            proc = self._table.process(pid)
            if proc is not None and proc.live and pid not in self._alive:
                self._check_row(pid, proc)

    def _name(self, path: Path) -> str:
        return path.relative_to(self._home.path).as_posix()

    def _put_aside(self, path: Path, name: str) -> None:
        self._aside.mkdir(mode=0o700, exist_ok=True)
        path.rename(database.unused(self._aside / name))

    def _without_a_row(self, pid: int, folder: Path) -> None:
        if [p.name for p in folder.iterdir()] == ["log"]:
            return  # a service's: it has no row, and the next boot removes its log
        kept = pid in self._table.lost or any(
            (folder / name).exists() for name in ("checkpoints", "result.json")
        )
        what = f"process {pid} has a folder and no row"
        if kept or self._table.damaged:
            self._report.found(
                self._name(folder), what, f"moved to {LOST_AND_FOUND}/process-{pid}",
                lambda: self._put_aside(folder, f"process-{pid}"),
            )  # fmt: skip
        else:
            self._report.found(
                self._name(folder), what, "removed, as the next boot would",
                lambda: shutil.rmtree(folder),
            )  # fmt: skip

    def _check_folder(self, pid: int, folder: Path) -> None:
        self._check_stream(pid, folder / "stream")
        result = folder / "result.json"
        if result.exists() and not _is_map(result):
            self._report.found(
                self._name(result), "the last words cannot be read", f"moved to {LOST_AND_FOUND}",
                lambda: self._put_aside(result, f"result-{pid}.json"),
            )  # fmt: skip
        for left in (folder / ".result.json", folder / "steps", folder / "moved"):
            if left.exists():
                self._report.found(
                    self._name(left), "left by a worker that has ended", "removed", left.unlink
                )
        if (folder / "checkpoints").is_dir():
            self._check_checkpoints(pid, folder / "checkpoints")

    def _check_stream(self, pid: int, path: Path) -> None:
        if not path.is_file():
            return
        end, size = whole_until(path), path.stat().st_size
        if end == size:
            return
        what = f"{size - end} bytes after the last whole record (at {end})"
        repair = f"cut there; what was cut is in {LOST_AND_FOUND}/stream-{pid}"

        def cut() -> None:
            self._aside.mkdir(mode=0o700, exist_ok=True)
            with path.open("r+b") as stream:
                stream.seek(end)
                aside = database.unused(self._aside / f"stream-{pid}")
                aside.write_bytes(stream.read())
                stream.truncate(end)

        self._report.found(self._name(path), what, repair, cut)

    def _check_checkpoints(self, pid: int, root: Path) -> None:
        writing = root / ".writing"
        if writing.exists():
            self._report.found(
                self._name(writing), "a checkpoint was being written", "removed",
                lambda: shutil.rmtree(writing),
            )  # fmt: skip
        for replaced in sorted(root.glob(f"{REPLACED}step-*")):
            self._bring_back(replaced)
        for folder in sorted(root.glob("step-*")):
            why = damage(folder) if _STEP.fullmatch(folder.name) else "its name has no step"
            if why is not None:
                name = f"checkpoint-{pid}-{folder.name}"
                self._report.found(
                    self._name(folder), f"the checkpoint is damaged ({why})",
                    f"moved to {LOST_AND_FOUND}/{name}; the one before it counts",
                    lambda folder=folder, name=name: self._put_aside(folder, name),  # type: ignore[misc]
                )  # fmt: skip

    def _bring_back(self, replaced: Path) -> None:
        """One that was about to be replaced: it counts again when its heir is not there."""
        target = replaced.parent / replaced.name.removeprefix(REPLACED)
        if target.exists():
            self._report.found(
                self._name(replaced), "a checkpoint that was replaced", "removed",
                lambda: shutil.rmtree(replaced),
            )  # fmt: skip
        else:
            self._report.found(
                self._name(replaced), "a checkpoint was being replaced, its heir is not there",
                f"it is {target.name} again", lambda: replaced.rename(target),
            )  # fmt: skip

    def _check_row(self, pid: int, proc: Process) -> None:
        folder = self._home.work(pid)
        started = proc.started_at is not None and proc.role in (Role.PROCESS, Role.GUEST)
        if started and not folder.is_dir():
            self._report.found(
                self._name(folder), f"process {pid} has begun and has no folder",
                "an empty one was made: it begins anew", lambda: folder.mkdir(0o700, parents=True),
            )  # fmt: skip
        if proc.checkpoint is None:
            return
        said = Path(str(proc.checkpoint.get("folder", "")))
        inside = said.parent == folder / "checkpoints"  # not so in a home that was copied
        if inside and said.is_dir() and damage(said) is None:
            return
        good = _newest_good(folder / "checkpoints")
        where = f"step {int(good.name[5:])}" if good else "the beginning"

        def point() -> None:
            at = (proc.checkpoint or {}).get("at", 0.0)
            step = int(good.name[5:]) if good else 0
            proc.checkpoint = {"folder": str(good), "step": step, "at": at} if good else None
            self._table.change(pid)

        self._report.found(
            self._home.journal.name, f"process {pid} names a checkpoint that is not there or "
            f"damaged ({said.name})", f"it goes on from {where}", point,
        )  # fmt: skip


def whole_until(path: Path) -> int:
    """Where the last whole record of a stream ends (as drivers/worker/stream.py)."""
    data = path.read_bytes()
    at = 0
    while len(data) - at >= 4:
        (size,) = _HEADER.unpack_from(data, at)
        if size > MAX_FRAME_BYTES or len(data) - at - 4 < size:
            break
        try:
            record = unpack(data[at + 4 : at + 4 + size])
        except ProtocolError:
            break
        if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
            break
        at += 4 + size
    return at


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint (as drivers/worker/checkpoint.py has them); None: nothing."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_text())
        for name, value in sums.items():
            with (folder / name).open("rb") as f:
                if hashlib.file_digest(f, "sha256").hexdigest() != value:
                    return f"{name} has another checksum"
    except OSError as exc:
        return exc.strerror or str(exc)
    except (ValueError, AttributeError) as exc:
        return f"{CHECKSUMS} cannot be read ({type(exc).__name__})"
    return None


def _newest_good(root: Path) -> Path | None:
    found = [p for p in root.glob("step-*") if _STEP.fullmatch(p.name) and damage(p) is None]
    return max(found, key=lambda p: p.name, default=None)


def _is_map(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except (OSError, ValueError):
        return False
