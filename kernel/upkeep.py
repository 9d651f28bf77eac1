"""What the kernel does by itself: measure, keep logs to their size, forget who ended long ago, and
write a journal anew that was lost or takes no row."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
from typing import TYPE_CHECKING

from llmos.kernel import events as ev
from llmos.kernel import retention
from llmos.kernel.health import LOOK_S
from llmos.kernel.ledger import SYSTEM_PID
from llmos.kernel.log import log
from llmos.kernel.streams import trim

if TYPE_CHECKING:
    from llmos.kernel.kernel import Kernel

# Memory is measured so many times less often while no device works.
IDLE_MEASURE = 5
# A worker that floods its log at a gigabyte a second is a gigabyte above the limit, no more.
LOOK_AT_LOGS_S = 1.0

# What was learned is written down once in so many measurements.
SAVE_EVERY = 30


class Upkeep:
    def __init__(self, kernel: Kernel) -> None:
        self._k = kernel
        self._trimmed: set[int] = set()

    def begin(self) -> None:
        self._k.spawn(self._measure_for_ever())
        self._k.spawn(self._trim_for_ever())
        self._k.spawn(self._keep_house())

    def forget_old(self) -> None:
        """Ended processes go after a while; but nobody whom somebody waits for or reads."""
        held = self._k.waited_for() | self._k.growth.waited_for()
        pids = retention.choose(self._k.core.m, self._k.now(), held)
        if pids:
            log(f"{len(pids)} processes that ended long ago are forgotten")
            self._k.post(ev.Expired(tuple(pids)))

    def write_journal_anew(self) -> None:
        """The file is damaged or gone: everything that belongs into it is in the table."""
        log(f"{self._k.journal.failed}; it is written anew, the old one goes to lost+found")
        table = [
            (proc, self._k.worker_rows.get(proc.pid, {}))
            for proc in self._k.core.m.procs.values() if self._k.journaled(proc)
        ]  # fmt: skip
        self._k.journal.write_anew(table)

    def row_refused(self, pid: int, why: str) -> None:
        """It cannot be kept as it is: the process ends, and what is left of it is small."""
        proc = self._k.core.m.procs.get(pid)
        if proc is None:
            return
        log(f"the row of process {pid} cannot be written ({why}): it is left out")
        proc.inputs.clear()
        if proc.live:
            self._k.post(ev.GivenUp(pid, f"its row in the journal cannot be written: {why}"))
        elif proc.args or proc.env or proc.result:
            proc.args, proc.env, proc.result = {}, {}, {}
            self._k.carry_out([ev.Save(pid)])

    async def _keep_house(self) -> None:
        """Look at the disk, and now and then at who may be forgotten."""
        forgot_at = -math.inf
        while True:
            self._k.health.look()
            if self._k.now() - forgot_at >= retention.EVERY_S:
                forgot_at = self._k.now()
                self.forget_old()
            await asyncio.sleep(LOOK_S)

    async def _measure_for_ever(self) -> None:
        for passes in itertools.count(1):
            await self.measure()
            if passes % SAVE_EVERY == 0:
                self._k.planner.save()
            # Reading the pages of a large process takes milliseconds: less often when idle.
            for queue in self._k.core.m.devices.values():
                queue.load(self._k.now())  # keeps its marks, so that the first who asks is told
            working = any(q.leases for q in self._k.core.m.devices.values())
            await asyncio.sleep(self._k.config.measure_s * (1 if working else IDLE_MEASURE))

    async def _trim_for_ever(self) -> None:
        """Logs are kept to their size. A worker writes its own file, so it is looked at."""
        while True:
            await asyncio.sleep(LOOK_AT_LOGS_S)
            most = self._k.config.log_size
            for worker in list(self._k.core.m.workers.values()):
                log_path = self._k.home.work(worker.pid) / "log"
                if trim(log_path, most) and worker.pid not in self._trimmed:
                    self._trimmed.add(worker.pid)
                    self._k.dmesg.write("log-trimmed", worker.pid, f"kept to {most:,} bytes")
            for path in self._k.home.path.glob("*.log"):  # the kernel's and its zygotes'
                trim(path, most)

    async def measure(self) -> None:
        """One pass over the memory of every device."""
        k = self._k
        system = [os.getpid(), *k.host.os_pids()]
        services = await k.host.measure("", [])
        for name, (_, driver) in k.devices.items():
            sample = await driver.measure(name, system)
            pid_of = {w.worker_id: w.pid for w in k.core.m.workers.values()}
            found = {**sample.workers, **services.workers}
            by_pid = {pid_of[w]: n for w, n in found.items() if w in pid_of}
            if name == next(iter(k.devices)):
                by_pid[SYSTEM_PID] = sample.system_bytes
            with k.dmesg.because(k.dmesg.cause("measured", name)):
                k.post(ev.Measured(name, by_pid, sample.available_bytes, sample.foreign_bytes))
