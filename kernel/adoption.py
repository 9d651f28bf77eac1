"""The workers of an earlier kernel: dialled, adopted, or ended; and what nobody knows any more.

Those that are adopted speak within seconds. Until then their processes are nobody's to judge, and
nothing is cleaned away.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from llmos.kernel import events as ev
from llmos.kernel.database import unused
from llmos.kernel.errors import HomeUnusable, LlmosError
from llmos.kernel.home import boot_id
from llmos.kernel.journal import LOST_AND_FOUND
from llmos.kernel.ledger import SYSTEM_PID
from llmos.kernel.log import log
from llmos.kernel.process import Process, Role, State
from llmos.kernel.rows import DamagedRow, unpack_row

if TYPE_CHECKING:
    from llmos.kernel.kernel import Kernel

# No OS process has begun then.
NEVER = -2.0


class Adoption:
    def __init__(self, kernel: Kernel) -> None:
        self._k = kernel
        self._older: set[str] = set()  # workers of an earlier kernel
        self.left_attached: dict[int, bytes] = {}  # rows of its attached guests
        self.over = asyncio.Event()  # all of them have spoken, or are gone

    async def clean_up(self) -> None:
        """Folders of processes and workers that nobody knows any more go, once the adopted have
        all spoken."""
        old = list((self._k.home.path / "w").iterdir())
        while self.pending():
            await self._k.growth.wait(SYSTEM_PID, 1.0)
        self._restore_attached()
        self.over.set()
        known = self._k.core.m.procs.keys() | self._k.journal.aside.keys()
        for folder in (self._k.home.path / "procs").iterdir():
            if not folder.name.isdigit() or int(folder.name) in known:
                continue
            if (folder / "checkpoints").exists():  # somebody may miss it
                log(f"nobody knows process {folder.name}: what it left goes to {LOST_AND_FOUND}")
                self._put_aside(folder)
            else:
                shutil.rmtree(folder, ignore_errors=True)
        for folder in old:
            if folder.name not in self._k.core.m.workers:
                shutil.rmtree(folder, ignore_errors=True)

    def _restore_attached(self) -> None:
        """Attached guests that were in an engine which is gone, as the earlier kernel is."""
        k, found = self._k, []
        for pid, row in self.left_attached.items():
            try:
                guest, _ = unpack_row(row)
            except (DamagedRow, HomeUnusable) as exc:
                log(f"attached process {pid} cannot be read: {exc}")
                continue
            if guest.pid in k.core.m.procs or guest.pid >= k.first_pid:
                continue
            k.core.restore(guest)
            k.owners.wait_for(pid)
            found.append(pid)
        self.left_attached.clear()
        for pid in k.attached.pids() - k.core.m.procs.keys():
            k.attached.drop(pid)
        if found:
            self.revive_engines()
            k.carry_out(k.core.resume_all(k.now()))

    def _put_aside(self, folder: Path) -> None:
        aside = self._k.home.path / LOST_AND_FOUND
        with contextlib.suppress(OSError):
            aside.mkdir(mode=0o700, exist_ok=True)
            folder.rename(unused(aside / f"process-{folder.name}"))

    def pending(self) -> int:
        """How many workers of an earlier kernel have not spoken yet."""
        return sum(not w.up for w in self._k.core.m.workers.values() if w.worker_id in self._older)

    def adopt(self) -> None:
        """Dial the workers that may have outlived an earlier kernel. One whose user is known no
        more ends, with a reason, when all others are in the books."""
        given_up: list[ev.GivenUp] = []
        for pid, row in list(self._k.worker_rows.items()):
            proc = self._k.core.m.procs[pid]
            devices = tuple(row.get("devices") or [row["device"]])
            # After a reboot the numbers of OS processes are others', and so may be the times.
            same_boot = row.get("boot") in (None, boot_id())
            started = row["started"] if same_boot else NEVER
            end = functools.partial(self._end_older, row["os_pid"], started)
            if not all(d in self._k.devices for d in devices):
                end()
                continue
            try:
                spec = self._k.spec_of(proc, row["worker_id"], devices)
            except LlmosError as exc:
                end()
                given_up.append(ev.GivenUp(pid, f"it could not be adopted: {exc.message}"))
                continue
            guests = {g.pid for g in self._k.core.m.guests_of(pid)}
            self._older.add(row["worker_id"])
            self._k.core.adopt(pid, row["worker_id"], devices, guests)
            self._k.devices[devices[0]][1].adopt(spec, row["os_pid"], started)
        for event in given_up:
            self._k.post(event)

    def _end_older(self, os_pid: int, started: float) -> None:
        """It would go on beside the one that takes its place, in the same folder."""
        if self._k.host.started(os_pid) == started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(os_pid, signal.SIGKILL)

    def revive_engines(self) -> None:
        """Guests that were promised an answer need an engine again, one for all of its key."""
        for guest in list(self._k.core.m.procs.values()):
            if guest.role is not Role.GUEST or not guest.live:
                continue
            if guest.engine_key in self._k.core.m.engines:
                self._k.core.m.enter(guest)
                continue
            schema = self._k.manifest.get("programs", {}).get(guest.program)
            if schema is not None:
                engine = self._k.make_engine(schema, guest, guest.uid)
                self._k.core.m.enter(engine)
                self._k.core.m.enter(guest)
                engine.move(State.PLANNING, f"made for process {guest.pid}", self._k.now())
                self._k.planning[engine.pid] = self._k.spawn(self._revive_engine(engine))

    async def _revive_engine(self, engine: Process) -> None:
        try:
            segments = await self._k.planner.plan(self._k.schema_of(engine.program), engine)
            if engine.live:
                self._k.post(ev.Planned(engine.pid, segments))
        except LlmosError as exc:
            # Its guests were acknowledged: they end with a reason, and are not forgotten.
            if engine.live:
                log(f"no engine for {engine.name}: {exc.message}")
                self._k.post(ev.KillAsked(engine.pid, 15))
        finally:
            self._k.planning.pop(engine.pid, None)
