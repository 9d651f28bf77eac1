"""The core: an event goes in, orders come out. No clock, no socket, no torch.

The same code runs live, in tests with plain lists, and in a simulation with virtual time: the
time of an event is passed in. `lifecycle`, `endings`, `moving`, `asked` and `guests` say what an
event means for a process, `admission` who gets memory, `turns` who gets the device.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

from llmos.kernel import (
    admission,
    asked,
    deadlines,
    endings,
    guests,
    lifecycle,
    moving,
    outgrown,
    quota,
    retention,
    room,
    standing,
    turns,
    watch,
)
from llmos.kernel.events import (
    Alive,
    CanCheckpoint,
    CheckpointAsked,
    Checkpointed,
    Clock,
    DiskTold,
    Event,
    Expired,
    GivenUp,
    GuestIdle,
    InputGiven,
    KeepAsked,
    KillAsked,
    Loaded,
    Measured,
    Misspoke,
    MovedIn,
    MovedOut,
    MoveFailed,
    Order,
    PauseAsked,
    PlanFailed,
    Planned,
    ProcessDone,
    ReniceAsked,
    Reported,
    RestartAsked,
    ResumeAsked,
    Shrunk,
    ShutdownAsked,
    Signal,
    StartFailed,
    StopAsked,
    Submitted,
    WorkerGone,
    WorkerHeld,
    WorkerIdle,
    WorkerUp,
)
from llmos.kernel.ledger import SYSTEM_PID, Ledger
from llmos.kernel.machine import Input, Machine, Worker
from llmos.kernel.policies.base import Policy
from llmos.kernel.policies.guarded import Guarded
from llmos.kernel.policies.siblings import Siblings
from llmos.kernel.process import Process, Residency, Role, State
from llmos.kernel.sched import DeviceQueue
from llmos.kernel.settings import Settings
from llmos.kernel.usage import Usage


class Core:
    def __init__(
        self, now: float, policy: Policy | None = None, settings: Settings | None = None
    ) -> None:
        settings = settings or Settings()
        chosen = Guarded(policy, self._policy_failed) if policy is not None else Siblings()
        self.m = Machine(
            started_at=now, now=now, policy=chosen, settings=settings,
            ledger=Ledger(settings.margin_share, settings.margin_bytes),
            usage=Usage(settings.user_window_s),
        )  # fmt: skip

    def _policy_failed(self, why: str) -> None:
        self.m.record("policy-failed", SYSTEM_PID, why)
        self.m.line_dirty = self.m.order_stale = True
        self.m.reviewing = False  # the next policy says anew when to look

    def add_device(
        self, device: str, kind: str, capacity_bytes: int, lanes: int = 1, moves_to: str = "disk"
    ) -> None:
        """A device of the machine, before any event. `lanes`: 0 where any two may be packed."""
        m = self.m
        m.devices[device] = DeviceQueue(
            device, m.now, m.policy, m.settings.batch_share, m.settings.slices,
            may_pack=lambda a, b: turns.may_pack(m, device, a, b), _charged_until=m.now,
        )  # fmt: skip
        m.ledger.add_device(device, kind, capacity_bytes)
        m.on_device[device], m.moves_to[device], m.lanes[device] = {}, moves_to, lanes
        self._choose_pool(device, kind)
        if len(m.devices) == 1:
            # The kernel's own memory is on the first device: the host.
            system = [{"kind": "system", "bytes": 0, "shared": ""}]
            m.ledger.adopt((device,), SYSTEM_PID, system)

    def _choose_pool(self, device: str, kind: str) -> None:
        """Who names no device gets one of the first accelerator's kind, or a CPU where there is
        none: a training must not land on a CPU because the GPU is full."""
        kinds = {d: self.m.ledger.kind(d) for d in self.m.devices}
        best = next((k for k in kinds.values() if k != "cpu"), kind)
        self.m.pool = {d: None for d, k in kinds.items() if k == best}

    def handle(self, event: Event, now: float) -> list[Order]:
        """Take one event at time `now` (seconds, never going back) and say what to do.

        Raises LlmosError when a person asked for what cannot be; the state is then unchanged,
        but for a process that never fits, which is forgotten; the orders that follow from that
        come with the next event.
        """
        m = self.m
        m.now = max(m.now, now)
        _HANDLERS[type(event)](m, event)
        if m.shutting_down:
            _end_services_last(m)
        quota.settle(m, guests.quota_opened)
        admission.admit_waiting(m)
        turns.decide_all(m)
        while m.quota_changed:  # what was charged just now was the last of a quota
            quota.settle(m, guests.quota_opened)
            turns.decide_all(m)
        orders, m.out = m.out, []
        return orders

    def restore(self, proc: Process) -> None:
        """Enter a process of an earlier kernel into the table, before any event.

        A running one waits for a worker again, unless `adopt` follows for it.
        """
        self.m.earlier_s += proc.device_seconds
        if proc.live and proc.state is not State.PAUSED:
            proc.tell(self.m.now, "waiting", "the kernel started again")
            proc.state = State.WAITING
            proc.reason = "engine" if proc.role is Role.GUEST else "memory"
        proc.worker_id = ""
        proc.awaits_input = False  # an engine that lives says who does; a new one begins anew
        if proc.live:
            proc.residency = Residency.DISK if proc.checkpoint else Residency.NONE
        if proc.live and proc.inputs:
            self.m.early_input[proc.pid] = [Input(**given) for given in proc.inputs]
        self.m.enter(proc)
        if not proc.live:
            self.m.leave_engine(proc)

    def adopt(self, pid: int, worker_id: str, devices: tuple[str, ...], admitted: set[int]) -> None:
        """A worker of an earlier kernel lives: it keeps its process, and its memory."""
        m = self.m
        proc = m.procs[pid]
        worker = Worker(worker_id, pid, devices, admitted=set(admitted), admitted_at=m.now)
        for device in devices:
            m.on_device[device][worker_id] = None
        m.workers[worker_id] = worker
        m.next_worker = max(m.next_worker, int(worker_id.rpartition("-")[2]) + 1)
        m.ledger.adopt(devices, pid, proc.segments)
        proc.worker_id, proc.devices, proc.residency = worker_id, devices, Residency.DEVICE
        if proc.state is State.WAITING:
            proc.state, proc.reason = State.READY, "device"
        proc.tell(m.now, "adopted", f"worker {worker_id} outlived the kernel")
        m.reviewing = False  # this one has not been looked at yet
        admission.show_promise(m, proc)

    def adopt_guest(self, guest: Process, worker_id: str) -> None:
        """An engine of an earlier kernel has a guest that only it knows: an attached one."""
        m = self.m
        self.restore(guest)
        m.workers[worker_id].admitted.add(guest.pid)
        guest.tell(m.now, "adopted", f"is in engine {guest.engine_pid}, which outlived the kernel")

    def resume_all(self, now: float) -> list[Order]:
        """After `restore` and `adopt`: put what has no worker in line again."""
        self.m.now = max(self.m.now, now)
        for proc in list(self.m.procs.values()):
            if proc.state is not State.WAITING or proc.worker_id:
                continue
            if proc.role is Role.PROCESS or self.m.guests.get(proc.pid):
                admission.wait_for_memory(self.m, proc)
            elif proc.role is Role.ENGINE:
                endings.end(self.m, proc, 0, "its worker went with an earlier kernel")
        return self.handle(Clock(), now)

    def check(self) -> None:
        """The invariants. Tests call it after every event."""
        m = self.m
        m.ledger.check()
        m.waiting.check()
        for queue in m.devices.values():
            queue.check()
            holders = {
                w for w in m.on_device[queue.device] if m.procs[m.workers[w].pid].state
                is State.RUNNING
            }  # fmt: skip
            for worker_id in queue.leases:
                everywhere = [
                    m.devices[d].leases.get(worker_id) for d in m.workers[worker_id].devices
                ]
                assert all(everywhere), f"{worker_id} has some of its devices"
                assert len({bool(x.holding) for x in everywhere if x}) == 1, worker_id
            assert holders <= set(queue.leases), f"{queue.device}: {holders} run without a lease"
        for proc in m.procs.values():
            assert (proc.exit_status is not None) == (proc.state is State.EXITED), proc
            assert not (proc.worker_id and proc.worker_id not in m.workers), proc
            assert proc.pid not in m.waiting or proc.state is State.WAITING, proc
        busy = sum(q.busy_s for q in m.devices.values())
        charged = sum(p.device_seconds for p in m.procs.values())
        unsplit = sum(w.unsplit_s for w in m.workers.values())
        assert abs(busy + m.earlier_s - charged - unsplit) < 1e-6, (busy, charged, unsplit)


def _clock(m: Machine, e: Clock) -> None:
    """What was to be looked at by now."""
    while m.alarms and m.alarms[0][0] <= m.now + 1e-9:
        _, pid, device = heapq.heappop(m.alarms)
        if device:
            m.dirty[device] = None
        elif pid in m.procs:
            _look(m, m.procs[pid])
    quota.look(m)


def _look(m: Machine, proc: Process) -> None:
    """A moment has come that matters for a process: a restart, a keep-alive, a deadline, an age."""
    due = proc.next_start_at
    if proc.state is State.BACKOFF and due is not None and due <= m.now + 1e-9:
        if proc.role is Role.ENGINE:
            endings.end_unneeded(m, proc)
        if not m.shutting_down and proc.live:
            m.move(proc, State.WAITING, "starts again")
            admission.wait_for_memory(m, proc)
        return
    if proc.pid in m.waiting:
        standing.stand(m, proc)
        standing.look_when_late(m, proc)
    worker = m.worker_of(proc)
    if worker is None:
        return
    if worker.done is not None:
        lifecycle.lingers(m, proc, worker)
        watch.look(m, worker)
        return
    watch.look(m, worker)
    if worker.idle_since is not None:
        keep = float(proc.args.get("keep_alive_s", 300.0))
        kept = keep == 0 and m.guests_of(proc.pid)  # a chat does not load it for each turn
        if 0 <= keep <= m.now - worker.idle_since + 1e-6 and not kept:
            room.end_engine(m, worker, f"idle for {keep:.0f} s")
        return
    if proc.deadline_at is not None:
        deadlines.watch(m, proc)
    if len(m.waiting):
        m.line_dirty = True
    for device in worker.devices:
        turns.charge(m, device)
    admission.review(m, proc)


def _shutdown(m: Machine, _: ShutdownAsked) -> None:
    m.shutting_down = True
    m.waiting.clear()
    for worker in list(m.workers.values()):
        proc = m.procs[worker.pid]
        if worker.kill_signal or worker.done or proc.role is Role.SERVICE:
            continue
        if proc.role is Role.PROCESS and worker.loaded:
            worker.stop_asked = True
            if proc.state not in (State.PAUSED, State.BACKOFF):
                m.move(proc, State.STOPPING, "the kernel shuts down", "shutdown")
            if worker.away and worker.moving != "in":
                room.stop_away(m, worker)
                continue
            if worker.moving == "out" and not worker.stop_sent:
                worker.moving = ""  # to disk instead: its host memory ends with it
            turns.update(m, worker)
            if m.leases(worker) or not proc.needs_device:
                turns.send_stop(m, worker)
        else:
            worker.kill_signal, worker.kill_why = 15, "the kernel shut down"
            m.out.append(Signal(worker.worker_id, 15))
            turns.update(m, worker)
    for guest in [p for p in m.procs.values() if p.role is Role.GUEST and p.live and p.attached]:
        engine = m.engine_of(guest)
        if engine is None or not engine.worker_id:  # else it is ended with its engine's worker
            endings.end(m, guest, 128 + 15, "the kernel shut down")


def _end_services_last(m: Machine) -> None:
    """A training that is about to finish may still have to call one."""
    if any(m.procs[w.pid].role is not Role.SERVICE for w in m.workers.values()):
        return
    for worker in m.workers.values():
        if not worker.kill_signal:
            worker.kill_signal, worker.kill_why = 15, "the kernel shut down"
            m.out.append(Signal(worker.worker_id, 15))


_HANDLERS: dict[type[Any], Callable[[Machine, Any], None]] = {
    Submitted: lifecycle.submitted,
    Planned: lifecycle.planned,
    PlanFailed: lifecycle.plan_failed,
    WorkerUp: lifecycle.worker_up,
    Loaded: lifecycle.loaded,
    Reported: lifecycle.reported,
    Alive: lifecycle.alive,
    Misspoke: lifecycle.misspoke,
    WorkerIdle: lifecycle.worker_idle,
    GuestIdle: guests.guest_idle,
    ProcessDone: lifecycle.process_done,
    CanCheckpoint: lifecycle.can_checkpoint,
    Checkpointed: lifecycle.checkpointed,
    WorkerHeld: lifecycle.worker_held,
    WorkerGone: endings.worker_gone,
    StartFailed: endings.start_failed,
    GivenUp: asked.given_up,
    DiskTold: admission.disk_told,
    Expired: retention.expired,
    Measured: outgrown.measured,
    Shrunk: outgrown.shrunk,
    MovedOut: moving.moved_out,
    MovedIn: moving.moved_in,
    MoveFailed: moving.move_failed,
    KillAsked: asked.kill_asked,
    PauseAsked: asked.pause_asked,
    ResumeAsked: asked.resume_asked,
    ReniceAsked: asked.renice_asked,
    RestartAsked: asked.restart_asked,
    StopAsked: asked.stop_asked,
    CheckpointAsked: asked.checkpoint_asked,
    InputGiven: guests.input_given,
    KeepAsked: guests.keep_asked,
    ShutdownAsked: _shutdown,
    Clock: _clock,
}
