"""The kernel: the core with its clock, its drivers and its disk. Orders are carried out here.

Everything runs in one asyncio loop; nothing here blocks but opening small files.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import heapq
import json
import os
import pwd
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

from llmos.drivers.base import DeviceInfo, Driver, DriverEvent, WorkerSpec
from llmos.kernel import events as ev
from llmos.kernel.calls import Calls
from llmos.kernel.config import Config
from llmos.kernel.core import Core
from llmos.kernel.errors import LlmosError, TimedOut, from_wire
from llmos.kernel.home import Home
from llmos.kernel.journal import Journal
from llmos.kernel.ledger import SYSTEM_PID
from llmos.kernel.log import log
from llmos.kernel.messages import Inbox
from llmos.kernel.orders import executors
from llmos.kernel.process import Process, Role, State
from llmos.kernel.streams import Growth

# How many decisions the record keeps for `top`, `explain` and the demo.
RECORDS = 20_000

# A service answers within the caller's limit; a worker ends within this after being told to.
DRAIN_S = 60.0

# Memory is measured so many times less often while no device works.
IDLE_MEASURE = 5
MANIFEST_S = 60.0


class Kernel:
    def __init__(self, config: Config, home: Home, drivers: dict[str, Any]) -> None:
        self.config, self.home = config, home
        self.started = time.time()
        self._clock_zero = self.started - time.monotonic()
        self.core = Core(self.now())
        self.journal = Journal(home.journal)
        self.drivers: dict[str, Driver] = drivers
        self.host: Any = drivers["host"]
        self.devices: dict[str, tuple[DeviceInfo, Driver]] = {}
        self.worker_rows: dict[int, dict[str, Any]] = {}  # pid -> what adoption needs
        self.records: collections.deque[dict[str, Any]] = collections.deque(maxlen=RECORDS)
        self.record_seq = 0
        self.growth = Growth()
        self.manifest: dict[str, Any] = {}
        self.manifest_ready = asyncio.Event()
        self.stopping = asyncio.Event()
        self.next_pid = 1
        self.service_pids: dict[str, int] = {}
        self.services_started = asyncio.Event()
        self.clients: set[Any] = set()
        self.inbox = Inbox(self)
        self.calls = Calls(self)
        self._changed: dict[int, list[asyncio.Future[None]]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._alarms: list[float] = []  # a heap of the moments the core wants to be asked at
        self._closing = False
        self._tickets = 0
        self.plans: dict[int, asyncio.Future[list[dict[str, Any]]]] = {}
        self.planning: dict[int, asyncio.Task[None]] = {}  # engines that are being planned
        self._tasks: set[asyncio.Task[Any]] = set()
        self._executors = executors(self)
        self._loop = asyncio.get_running_loop()

    def now(self) -> float:
        """Epoch seconds that never go back, whatever is done to the machine's clock."""
        return self._clock_zero + time.monotonic()

    # ---- up and down ----

    async def open(self) -> None:
        """Devices into the books, processes of an earlier kernel into the table."""
        for driver in self.drivers.values():
            for info in driver.devices():
                self.devices[info.name] = (info, driver)
                self.core.add_device(info.name, info.kind, info.capacity_bytes)
        self._restore(self.journal.open())

    def _restore(self, rows: list[tuple[Process, dict[str, Any]]]) -> None:
        # A pid that has a folder was given away, though its process was never saved.
        given = [int(p.name) for p in self.home.work(0).parent.iterdir() if p.name.isdigit()]
        self.next_pid = max([0, *given]) + 1
        # Engines first: then a guest finds its own.
        for proc, worker in sorted(rows, key=lambda r: (r[0].role is not Role.ENGINE, r[0].pid)):
            self.next_pid = max(self.next_pid, proc.pid + 1)
            self.core.restore(proc)
            if proc.live and worker:
                self.worker_rows[proc.pid] = worker

    async def bring_up(self) -> None:
        """What may take longer than the socket: drivers, adoption, services, the manifest."""
        self._clean_up()
        for driver in self.drivers.values():
            await driver.open(self._tell, self.home.path, self.home.id)
        self._adopt()
        self.spawn(self._make_manifest())
        self.spawn(self._measure_for_ever())
        await self.manifest_ready.wait()
        self._revive_engines()
        self.carry_out(self.core.resume_all(self.now()))
        for name, service in sorted(self.manifest.get("services", {}).items()):
            self.start_service(name, service["entry"])
        self.services_started.set()

    def _clean_up(self) -> None:
        """Folders of processes that nobody knows any more go."""
        for folder in (self.home.path / "procs").iterdir():
            if folder.name.isdigit() and int(folder.name) not in self.core.m.procs:
                shutil.rmtree(folder, ignore_errors=True)

    def _adopt(self) -> None:
        """Dial the workers that may have outlived an earlier kernel."""
        for pid, row in list(self.worker_rows.items()):
            proc = self.core.m.procs[pid]
            if row["device"] not in self.devices:
                # It would go on beside the one that takes its place, in the same folder.
                if self.host.started(row["os_pid"]) == row["started"]:
                    os.killpg(row["os_pid"], signal.SIGKILL)
                continue
            guests = {g.pid for g in self.core.m.guests_of(pid)}
            self.core.adopt(pid, row["worker_id"], row["device"], guests)
            spec = self.spec_of(proc, row["worker_id"], row["device"])
            self.devices[row["device"]][1].adopt(spec, row["os_pid"], row["started"])

    def _revive_engines(self) -> None:
        """Guests that were promised an answer need an engine again, one for all of its key."""
        for guest in list(self.core.m.procs.values()):
            if guest.role is not Role.GUEST or not guest.live:
                continue
            if guest.engine_key in self.core.m.engines:
                self.core.m.enter(guest)
                continue
            if guest.attached:
                self.post(ev.KillAsked(guest.pid, 1))
                continue
            schema = self.manifest.get("programs", {}).get(guest.program)
            if schema is not None:
                engine = self.make_engine(schema, guest, guest.uid)
                self.core.m.enter(engine)
                self.core.m.enter(guest)
                engine.move(State.PLANNING, f"made for process {guest.pid}", self.now())
                self.planning[engine.pid] = self.spawn(self._revive_engine(engine))

    async def _revive_engine(self, engine: Process) -> None:
        try:
            segments = await self.plan(self.schema_of(engine.program), engine)
            if engine.live:
                self.post(ev.Planned(engine.pid, segments))
        except LlmosError as exc:
            # Its guests were acknowledged: they end with a reason, and are not forgotten.
            if engine.live:
                log(f"no engine for {engine.name}: {exc.message}")
                self.post(ev.KillAsked(engine.pid, 15))
        finally:
            self.planning.pop(engine.pid, None)

    async def drain(self) -> dict[str, int]:
        """Stop all workers at a safepoint; those that do not end in time are killed."""
        before = len([w for w in self.core.m.workers.values() if w.device])
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
        if self._timer is not None:
            self._timer.cancel()
        for driver in self.drivers.values():
            await driver.close()
        self.journal.close()

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
        for order in orders:
            self._executors[type(order)](order)

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

    def wake(self, pid: int) -> None:
        for future in self._changed.pop(pid, ()):
            if not future.done():
                future.set_result(None)
        self.growth.grown(pid)
        self.growth.grown(SYSTEM_PID)

    def wake_at(self, at: float) -> None:
        """One timer, for the earliest moment that the core wants to be asked again."""
        if at in self._alarms or self._closing:
            return
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
            heapq.heappop(self._alarms)
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
        self.service_pids[name] = proc.pid
        self.post(ev.Submitted(proc))
        self.post(ev.Planned(proc.pid, []))

    def schema_of(self, program: str) -> dict[str, Any]:
        schema: dict[str, Any] = self.manifest["programs"][program]
        return schema

    async def plan(self, schema: dict[str, Any], proc: Process) -> list[dict[str, Any]]:
        """Have a driver's planner predict the footprint. Raises what the program raised."""
        device = proc.device_wanted
        if device not in self.devices:  # not asked for, or of an earlier kernel
            device = next(iter(self.devices))
        self._tickets += 1
        ticket = self._tickets
        future: asyncio.Future[list[dict[str, Any]]] = self._loop.create_future()
        self.plans[ticket] = future
        self.devices[device][1].plan(ticket, schema["entry"], proc.args)
        try:
            return await future
        finally:
            self.plans.pop(ticket, None)

    def planned(self, ticket: int, segments: list[dict[str, Any]] | None, error: Any) -> None:
        future = self.plans.get(ticket)
        if future is None or future.done():
            return
        if error is not None:
            future.set_exception(from_wire(error))
        else:
            future.set_result(segments or [])

    def spec_of(self, proc: Process, worker_id: str, device: str) -> WorkerSpec:
        work = self.home.work(proc.pid)
        work.mkdir(parents=True, exist_ok=True, mode=0o700)
        service = ""
        if proc.role is Role.SERVICE:
            service = f"{proc.args['service']}={proc.args['entry']}"
        return WorkerSpec(
            worker_id, device, self.home.worker(worker_id), work / "log", self.home.path,
            proc.cwd, proc.env, service,
        )  # fmt: skip

    def driver_of(self, worker_id: str) -> Driver:
        device = self.core.m.workers[worker_id].device
        driver: Driver = self.devices[device][1] if device else self.host
        return driver

    # ---- in the background ----

    async def _make_manifest(self) -> None:
        """Read the cached manifest at once, have it checked, read it again if it was made."""
        with contextlib.suppress(OSError, ValueError):
            self.manifest = json.loads(self.home.manifest.read_text())
            self.manifest_ready.set()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "llmos.services.manifest", str(self.home.manifest),
            stdout=asyncio.subprocess.PIPE, cwd="/",
        )  # fmt: skip
        try:
            out, _ = await process.communicate()
        except asyncio.CancelledError:  # the kernel ends before it has begun
            process.kill()
            await process.wait()
            raise
        if process.returncode == 0 and out.strip() == b"made":
            self.manifest = json.loads(self.home.manifest.read_text())
        for text in self.manifest.get("errors", []):
            log(f"plugin left out: {text}")
        self.manifest_ready.set()

    async def _measure_for_ever(self) -> None:
        while True:
            await self.measure()
            # Reading the pages of a large process takes milliseconds: less often when idle.
            for queue in self.core.m.devices.values():
                queue.load(self.now())  # keeps its marks, so that the first who asks is told
            working = any(q.lease is not None for q in self.core.m.devices.values())
            await asyncio.sleep(self.config.measure_s * (1 if working else IDLE_MEASURE))

    async def measure(self) -> None:
        """One pass over the memory of every device."""
        system = [os.getpid(), *self.host.os_pids()]
        services = await self.host.measure("", [])
        for name, (_, driver) in self.devices.items():
            sample = await driver.measure(name, system)
            pid_of = {w.worker_id: w.pid for w in self.core.m.workers.values()}
            found = {**sample.workers, **services.workers}
            by_pid = {pid_of[w]: n for w, n in found.items() if w in pid_of}
            if name == next(iter(self.devices)):
                by_pid[SYSTEM_PID] = sample.system_bytes
            self.post(ev.Measured(name, by_pid, sample.available_bytes, sample.foreign_bytes))

    def record(self, what: str, pid: int, why: str, by: int) -> None:
        self.record_seq += 1
        self.records.append(
            {"seq": self.record_seq, "at": self.now(), "what": what, "pid": pid, "why": why,
             "by": by or None}
        )  # fmt: skip

    def shown(self, proc: Process) -> dict[str, Any]:
        """A process as `ps` shows it: a guest has the worker of its engine."""
        row = proc.to_wire()
        if proc.role is Role.GUEST and proc.live:
            engine = self.core.m.engine_of(proc)
            row["worker_id"] = engine.worker_id or None if engine is not None else None
        row["log"] = str(self.home.work(proc.pid) / "log")
        return row

    def hang_up(self, pid: int) -> None:
        """The client that an attached process belonged to is gone."""
        proc = self.core.m.procs.get(pid)
        if proc is not None and proc.live and not self.core.m.shutting_down:
            self.post(ev.KillAsked(pid, 1))

    def report(self, exc: BaseException | None) -> None:
        """A bug of ours: into the log, with everything."""
        if exc is not None:
            log("".join(traceback.format_exception(exc)))

    def clean_worker(self, worker_id: str) -> None:
        shutil.rmtree(self.home.worker(worker_id), ignore_errors=True)


def engine_name(model: str, asked: str) -> str:
    """How people call a model: its folder's name; a model in the making as `name@step`."""
    folder, _, last = model.rstrip("/").rpartition("/")
    if not folder.endswith("/checkpoints"):
        return last or asked
    return f"{asked}@{int(last.removeprefix('step-'))}"


def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
