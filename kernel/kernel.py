"""The kernel: the core with its clock, its drivers and its disk. Orders are carried out here.

Everything runs in one asyncio loop; nothing here blocks but opening small files.
"""

from __future__ import annotations

import asyncio
import heapq
import os
import shutil
import time
import traceback
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmos.drivers.base import DeviceInfo, Driver, DriverEvent, WorkerSpec
from llmos.kernel import access, disks
from llmos.kernel import events as ev
from llmos.kernel.adoption import Adoption
from llmos.kernel.attached import AttachedGuests
from llmos.kernel.calls import Calls
from llmos.kernel.config import Config, policy_of, settings_of
from llmos.kernel.connection import Connection
from llmos.kernel.core import Core
from llmos.kernel.dmesg import Cause, Dmesg
from llmos.kernel.errors import LlmosError, TimedOut
from llmos.kernel.health import Health
from llmos.kernel.home import Home
from llmos.kernel.installed import Installed
from llmos.kernel.journal import Journal
from llmos.kernel.ledger import SYSTEM_PID
from llmos.kernel.log import listeners, log
from llmos.kernel.messages import Inbox
from llmos.kernel.names import user_name
from llmos.kernel.orders import EXECUTORS
from llmos.kernel.owners import Owners
from llmos.kernel.planner import Planner
from llmos.kernel.process import Process, Role
from llmos.kernel.services import Services
from llmos.kernel.streams import Growth
from llmos.kernel.upkeep import Upkeep

# A service answers within the caller's limit; a worker ends within this after being told to.
DRAIN_S = 60.0


class Kernel:
    def __init__(self, config: Config, home: Home, drivers: dict[str, Any]) -> None:
        self.config, self.home = config, home
        self.group = access.group_of(config.group)
        self.started = time.time()
        self._clock_zero = self.started - time.monotonic()
        self.core = Core(self.now(), policy_of(config), settings_of(config))
        self.journal = Journal(home.journal, disks.disk_of(home.path).network)
        self.attached = AttachedGuests(home.attached)
        self.journal.on_change = lambda: self.health.look()
        self.upkeep = Upkeep(self)
        self.journal.on_lost = self.upkeep.write_journal_anew
        self.journal.on_refused = self.upkeep.row_refused
        self.drivers: dict[str, Driver] = drivers
        self.host: Any = drivers["host"]
        self.devices: dict[str, tuple[DeviceInfo, Driver]] = {}
        self.worker_rows: dict[int, dict[str, Any]] = {}  # pid -> what adoption needs
        self.dmesg: Dmesg = Dmesg(home.dmesg, self.now)
        self.last_cause: dict[str, Cause] = {}  # by worker: what its last order follows from
        self.comes_back: dict[int, Cause] = {}  # by pid: why it waits to be started again
        self.growth = Growth()
        self.health = Health(self)
        self.planner = Planner(self)
        self.manifest: dict[str, Any] = {}
        self.installed = Installed(self)
        self.stopping = asyncio.Event()
        self.adoption = Adoption(self)
        self.next_pid = self.first_pid = 1  # `first_pid`: of this kernel; those before are older
        self.services = Services(self)
        self.clients: set[Any] = set()
        self.owners = Owners(self)
        self.inbox = Inbox(self)
        self.calls = Calls(self)
        self._changed: dict[int, list[asyncio.Future[None]]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._alarms: list[float] = []  # a heap of the moments the core wants to be asked at
        self._alarms_at: set[float] = set()  # the same, to look one up
        self._closing = False
        self.planning: dict[int, asyncio.Task[None]] = {}  # engines that are being planned
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.get_running_loop()

    def now(self) -> float:
        """Epoch seconds that never go back, whatever is done to the machine's clock."""
        return self._clock_zero + time.monotonic()

    # ---- up and down ----

    async def open(self) -> None:
        """Devices into the books, processes of an earlier kernel into the table."""
        last = self.dmesg.open()
        listeners.append(self._logged)
        for driver in self.drivers.values():
            for info in driver.devices():
                self.devices[info.name] = (info, driver)
                self.core.add_device(
                    info.name, info.kind, info.capacity_bytes, info.lanes, info.moves_to
                )
        self.planner.load()
        rows = self.journal.open()
        names = ", ".join(self.devices)
        died = "; the kernel before it died" if last not in ("", "shutdown") else ""
        boot = f"llmos {version('llmos')}, OS process {os.getpid()}, {names}{died}"
        self.dmesg.write("boot", why=boot)
        self._restore(rows)
        self.adoption.left_attached = self.attached.open()
        self.health.look()
        for pid, why in self.journal.aside.items():
            log(f"the row of process {pid} is damaged ({why}) and set aside: `llmos fsck` tells")
        if self.health.disk.network:
            kind, mode = self.health.disk.kind, self.journal.mode
            log(f"the home lies on a network disk ({kind}): the journal is in mode {mode}, not WAL")

    def _restore(self, rows: list[tuple[Process, dict[str, Any]]]) -> None:
        # A pid that has a folder was given away, though its process was never saved.
        given = [int(p.name) for p in self.home.work(0).parent.iterdir() if p.name.isdigit()]
        self.next_pid = max([0, self.journal.last_pid, *given]) + 1
        # Engines first: then a guest finds its own.
        for proc, worker in sorted(rows, key=lambda r: (r[0].role is not Role.ENGINE, r[0].pid)):
            self.next_pid = max(self.next_pid, proc.pid + 1)
            self.core.restore(proc)
            if proc.live and worker:
                self.worker_rows[proc.pid] = worker
            if proc.live and proc.attached:
                self.owners.wait_for(proc.pid)
        self.first_pid = self.next_pid

    async def bring_up(self) -> None:
        """What may take longer than the socket: drivers, adoption, services, the manifest."""
        for driver in self.drivers.values():
            await driver.open(self._tell, self.home.path, self.home.id)
        self.adoption.adopt()
        self.spawn(self.adoption.clean_up())
        self.spawn(self.installed.boot())
        self.upkeep.begin()
        await self.installed.ready.wait()
        self.adoption.revive_engines()
        self.carry_out(self.core.resume_all(self.now()))
        self.services.start_all()
        self.spawn(self.services.watch())

    async def drain(self) -> dict[str, int]:
        """Stop all workers at a safepoint; those that do not end in time are killed."""
        before = len([w for w in self.core.m.workers.values() if w.devices])
        self.post(ev.ShutdownAsked())
        deadline = self._loop.time() + DRAIN_S
        while self.core.m.workers:
            if self._loop.time() > deadline:
                for worker in self.core.m.workers.values():
                    self.driver_of(worker.worker_id).signal(worker.worker_id, 9)
                deadline += DRAIN_S
            await self.growth.wait(SYSTEM_PID, 0.2)
        saved = [p for p in self.core.m.procs.values() if p.live and p.checkpoint]
        await self.journal.flushed()
        return {"stopped": before, "checkpoints": len(saved)}

    async def close(self) -> None:
        self._closing = True  # what ends from here on is not started again
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.owners.close()
        if self._timer is not None:
            self._timer.cancel()
        for driver in self.drivers.values():
            await driver.close()
        self.planner.save()
        self.journal.close()
        self.attached.close()
        self.dmesg.write("shutdown", 0, "the kernel ends")
        listeners.remove(self._logged)
        self.dmesg.close()

    def _logged(self, text: str) -> None:
        self.dmesg.write(
            "log", 0, text.rstrip().splitlines()[-1] if text.strip() else "", 0, "warning"
        )

    # ---- the loop of events and orders ----

    def post(self, event: ev.Event) -> None:
        """Hand an event to the core and carry out what it orders. May raise LlmosError."""
        try:
            orders = self.core.handle(event, self.now())
        except LlmosError:
            self.carry_out(self.core.handle(ev.Clock(), self.now()))
            raise
        self.carry_out(orders)

    def carry_out(self, orders: list[ev.Order]) -> None:
        cause = self.dmesg.current()
        for order in orders:
            if isinstance(order, ev.Record) and order.what == "backoff" and cause is not None:
                self.comes_back[order.pid] = cause
            if isinstance(order, ev.SETTING_OFF) and cause is not None:
                again = None
                if isinstance(order, ev.StartWorker):
                    again = self.comes_back.pop(order.pid, None)
                self.last_cause[order.worker_id] = again or cause
            EXECUTORS[type(order)](self, order)

    def later(self, event: ev.Event) -> None:
        """Post an event after the one that is being carried out."""
        self._loop.call_soon(self.post, event)

    def _tell(self, event: DriverEvent) -> None:
        self.inbox.take(event)

    async def changed(
        self, pid: int, until: Callable[[Process], bool], limit_s: float | None
    ) -> Process:
        """Wait until `until(process)` holds. TimedOut after `limit_s`; NoSuchProcess when the
        process is refused while somebody waits for it."""
        proc = self.core.m.find(pid)
        try:
            async with asyncio.timeout(limit_s):
                while not until(self.core.m.find(pid)):
                    future = self._loop.create_future()
                    self._changed.setdefault(pid, []).append(future)
                    await future
        except TimeoutError:
            raise TimedOut(f"process {pid} is still {proc.state} after {limit_s:g} s") from None
        return proc

    def waited_for(self) -> set[int]:
        """Of which processes somebody waits for a change."""
        return set(self._changed)

    def wake(self, pid: int) -> None:
        for future in self._changed.pop(pid, ()):
            if not future.done():
                future.set_result(None)
        self.growth.grown(pid)
        self.growth.grown(SYSTEM_PID)

    def wake_at(self, at: float) -> None:
        """One timer, for the earliest moment that the core wants to be asked again."""
        if at in self._alarms_at or self._closing:
            return
        self._alarms_at.add(at)
        heapq.heappush(self._alarms, at)
        if self._alarms[0] == at:
            self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        delay = max(0.0, self._alarms[0] - self.now())
        self._timer = self._loop.call_later(delay, self._on_timer)

    def _on_timer(self) -> None:
        self._timer, now = None, self.now()
        while self._alarms and self._alarms[0] <= now:
            self._alarms_at.discard(heapq.heappop(self._alarms))
        with self.dmesg.because(self.dmesg.cause("clock", "a moment had come")):
            self.post(ev.Clock())
        if self._timer is None and self._alarms:
            self._set_timer()

    def spawn(self, work: Awaitable[Any], answers: bool = False) -> asyncio.Task[Any]:
        """Run in the background. With `answers` its LlmosError is somebody's answer, no bug."""
        task: asyncio.Task[Any] = self._loop.create_task(work)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(lambda _: self._task_ended(task, answers))
        return task

    def _task_ended(self, task: asyncio.Task[Any], answers: bool) -> None:
        self._tasks.discard(task)
        if task.cancelled() or task.exception() is None:
            return
        if not (answers and isinstance(task.exception(), LlmosError)):
            self._loop.call_exception_handler(
                {"message": "a task of the kernel failed", "exception": task.exception()}
            )

    # ---- processes ----

    def take_pid(self) -> int:
        pid = self.next_pid
        self.next_pid += 1
        return pid

    def make_engine(self, schema: dict[str, Any], guest: Process, uid: int) -> Process:
        """The process that hosts a guest: its program and arguments follow from the guest's."""
        engine_schema = self.schema_of(schema["engine"])
        args = {f["name"]: f["default"] for f in engine_schema["args"]}
        args |= {name: guest.args[name] for name in schema["engine_args"] if name in guest.args}
        return Process(
            pid=self.take_pid(), program=schema["engine"], args=args, user=user_name(uid), uid=uid,
            submitted_at=self.now(), name=engine_name(str(args.get("model", "")), guest.name),
            role=Role.ENGINE, device_wanted=guest.device_wanted, engine_key=guest.engine_key,
            cls=guest.cls, cwd=guest.cwd,
        )  # fmt: skip

    def start_service(self, name: str, entry: str) -> None:
        proc = Process(
            pid=self.take_pid(), program="service", args={"service": name, "entry": entry},
            user=user_name(os.getuid()), uid=os.getuid(), submitted_at=self.now(), name=name,
            role=Role.SERVICE, restart="always",
        )  # fmt: skip
        self.services.pids[name] = proc.pid
        self.post(ev.Submitted(proc))
        self.post(ev.Planned(proc.pid, []))

    def schema_of(self, program: str) -> dict[str, Any]:
        schema: dict[str, Any] = self.manifest["programs"][program]
        return schema

    def spec_of(self, proc: Process, worker_id: str, devices: tuple[str, ...]) -> WorkerSpec:
        work, user = self.work_of(proc), access.drop_to(proc.uid)
        service, memory_bytes = "", 0
        if proc.role is Role.SERVICE:
            service = f"{proc.args['service']}={proc.args['entry']}"
            memory_bytes = self.services.memory_bytes(proc.args["service"])
        return WorkerSpec(
            worker_id, devices[0] if devices else "", self.home.worker(worker_id), work / "log",
            self.home.path, proc.cwd, proc.env, service, user, memory_bytes, devices,
            alone_s=self.config.alone_s,
        )  # fmt: skip

    def work_of(self, proc: Process) -> Path:
        """The folder of a process, made if need be; it is its user's."""
        work = self.home.work(proc.pid)
        work.mkdir(parents=True, exist_ok=True, mode=0o700)
        user = access.drop_to(proc.uid)
        if user is not None:
            os.chown(work, user["uid"], user["gid"], follow_symlinks=False)
        return work

    def driver_of(self, worker_id: str) -> Driver:
        device = self.core.m.workers[worker_id].device
        driver: Driver = self.devices[device][1] if device else self.host
        return driver

    # ---- in the background ----

    def journaled(self, proc: Process) -> bool:
        """Does its row belong on the disk? A service is made anew at each boot. An attached
        generation is known to its engine and its client; without an engine it would be to nobody.
        """
        if proc.role is Role.GUEST and proc.attached and proc.live:
            engine = self.core.m.engine_of(proc)
            worker = self.core.m.worker_of(engine) if engine is not None else None
            return worker is None or not worker.up
        return proc.role is not Role.SERVICE

    def shown(self, proc: Process, client: Connection) -> dict[str, Any]:
        """A process as `ps` shows it: a guest has the worker of its engine."""
        row = proc.to_wire()
        if proc.role is Role.GUEST and proc.live:
            engine = self.core.m.engine_of(proc)
            row["worker_id"] = engine.worker_id or None if engine is not None else None
        worker = self.core.m.workers.get(row["worker_id"] or "")
        row["os_pid"] = worker.os_pid or None if worker is not None else None
        row["log"] = str(self.home.work(proc.pid) / "log")
        return access.masked(client, proc, row)

    def report(self, exc: BaseException | None) -> None:
        """A bug of ours: into the log, with everything."""
        if exc is not None:
            log("".join(traceback.format_exception(exc)))

    def clean_worker(self, worker_id: str) -> None:
        self.last_cause.pop(worker_id, None)
        self._remove(self.home.worker(worker_id), 3)

    def _remove(self, folder: Path, again: int) -> None:
        """Its zygote may be writing into it at this very moment: then a little later."""
        shutil.rmtree(folder, ignore_errors=True)
        if again and folder.exists():
            self._loop.call_later(1.0, self._remove, folder, again - 1)


def engine_name(model: str, asked: str) -> str:
    """How people call a model: its folder's name; a model in the making as `name@step`."""
    folder, _, last = model.rstrip("/").rpartition("/")
    if not folder.endswith("/checkpoints"):
        return last or asked
    return f"{asked}@{int(last.removeprefix('step-'))}"
