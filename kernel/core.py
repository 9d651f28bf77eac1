"""The core: an event goes in, orders come out. No clock, no socket, no torch.

The same code runs live, in tests with plain lists, and in a simulation with virtual time: the
time of an event is passed in. `lifecycle`, `asked` and `guests` say what an event means for a
process, `admission` who gets memory, `turns` who gets the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmos.kernel import admission, asked, guests, lifecycle, turns
from llmos.kernel.events import (
    CheckpointAsked,
    Checkpointed,
    Clock,
    Event,
    GuestIdle,
    InputGiven,
    KillAsked,
    Loaded,
    Measured,
    Order,
    PauseAsked,
    PlanFailed,
    Planned,
    ProcessDone,
    ReniceAsked,
    Reported,
    RestartAsked,
    ResumeAsked,
    ShutdownAsked,
    Signal,
    Stop,
    Submitted,
    WorkerGone,
    WorkerHeld,
    WorkerIdle,
    WorkerUp,
)
from llmos.kernel.ledger import SYSTEM_PID
from llmos.kernel.machine import Machine, Worker
from llmos.kernel.process import Process, Residency, Role, State
from llmos.kernel.sched import DeviceQueue


class Core:
    def __init__(self, now: float) -> None:
        self.m = Machine(started_at=now, now=now)

    def add_device(self, device: str, kind: str, capacity_bytes: int) -> None:
        self.m.devices[device] = DeviceQueue(device, self.m.now)
        self.m.ledger.add_device(device, kind, capacity_bytes)
        if len(self.m.devices) == 1:
            # The kernel's own memory is on the first device: the host.
            system = [{"kind": "system", "bytes": 0, "shared": ""}]
            self.m.ledger.adopt(device, SYSTEM_PID, system)

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
        admission.admit_waiting(m)
        for device in m.devices:
            turns.decide(m, device)
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
        self.m.enter(proc)
        if not proc.live:
            self.m.leave_engine(proc)

    def adopt(self, pid: int, worker_id: str, device: str, admitted: set[int]) -> None:
        """A worker of an earlier kernel lives: it keeps its process, and its memory."""
        m = self.m
        proc = m.procs[pid]
        worker = Worker(worker_id, pid, device, admitted=set(admitted))
        m.workers[worker_id] = worker
        m.next_worker = max(m.next_worker, int(worker_id.rpartition("-")[2]) + 1)
        m.ledger.adopt(device, pid, proc.segments)
        proc.worker_id, proc.device, proc.residency = worker_id, device, Residency.DEVICE
        if proc.state is State.WAITING:
            proc.state, proc.reason = State.READY, "device"
        proc.tell(m.now, "adopted", f"worker {worker_id} outlived the kernel")
        admission.show_promise(m, proc)

    def resume_all(self, now: float) -> list[Order]:
        """After `restore` and `adopt`: put what has no worker in line again."""
        self.m.now = max(self.m.now, now)
        for proc in list(self.m.procs.values()):
            if proc.state is not State.WAITING or proc.worker_id:
                continue
            if proc.role is Role.PROCESS or self.m.guests.get(proc.pid):
                admission.wait_for_memory(self.m, proc)
            elif proc.role is Role.ENGINE:
                lifecycle.end(self.m, proc, 0, "its worker went with an earlier kernel")
        return self.handle(Clock(), now)

    def check(self) -> None:
        """The invariants. Tests call it after every event."""
        m = self.m
        m.ledger.check()
        for queue in m.devices.values():
            queue.check()
            holders = [w for w in m.workers.values() if w.device == queue.device and _runs(m, w)]
            assert len(holders) <= 1, f"{queue.device}: {holders} run at once"
            if holders:
                assert queue.lease is not None
                assert queue.lease.worker_id == holders[0].worker_id
        for proc in m.procs.values():
            assert (proc.exit_status is not None) == (proc.state is State.EXITED), proc
            assert not (proc.worker_id and proc.worker_id not in m.workers), proc
            assert proc.pid not in m.waiting or proc.state is State.WAITING, proc
        busy = sum(q.busy_s for q in m.devices.values())
        charged = sum(p.device_seconds for p in m.procs.values())
        unsplit = sum(w.unsplit_s for w in m.workers.values())
        assert abs(busy + m.earlier_s - charged - unsplit) < 1e-6, (busy, charged, unsplit)


def _runs(m: Machine, worker: Worker) -> bool:
    return m.procs[worker.pid].state is State.RUNNING and bool(worker.device)


def _measured(m: Machine, e: Measured) -> None:
    m.ledger.observe(e.device, e.available_bytes, e.foreign_bytes)
    settled = {
        w.pid: w.reports >= lifecycle.SETTLED_STEPS or w.idle_since is not None
        for w in m.workers.values()
    }
    for pid, nbytes in e.by_pid.items():
        m.ledger.measure(pid, nbytes, settled.get(pid, False))
        if pid in m.procs and m.procs[pid].worker_id:
            admission.show_promise(m, m.procs[pid])


def _clock(m: Machine, _: Clock) -> None:
    for proc in list(m.procs.values()):
        due = proc.next_start_at
        if proc.state is State.BACKOFF and due is not None and due <= m.now and not m.shutting_down:
            m.move(proc, State.WAITING, "starts again")
            admission.wait_for_memory(m, proc)
    for worker in m.workers.values():
        if worker.idle_since is not None:
            keep = float(m.procs[worker.pid].args.get("keep_alive_s", 300.0))
            if 0 <= keep <= m.now - worker.idle_since + 1e-6:
                admission.end_engine(m, worker, f"idle for {keep:.0f} s")


def _shutdown(m: Machine, _: ShutdownAsked) -> None:
    m.shutting_down = True
    m.waiting.clear()
    for worker in list(m.workers.values()):
        proc = m.procs[worker.pid]
        if worker.kill_signal or worker.done or proc.role is Role.SERVICE:
            continue
        if proc.role is Role.PROCESS and worker.loaded:
            worker.stop_asked = True
            if proc.state is not State.PAUSED:
                m.move(proc, State.STOPPING, "the kernel shuts down", "shutdown")
            queue = m.devices[worker.device]
            if queue.lease is not None and queue.lease.worker_id == worker.worker_id:
                worker.stop_sent = True
                m.out.append(Stop(worker.worker_id))
            turns.update(m, worker)
        else:
            worker.kill_signal, worker.kill_why = 15, "the kernel shut down"
            m.out.append(Signal(worker.worker_id, 15))
            turns.update(m, worker)


def _end_services_last(m: Machine) -> None:
    """A training that is about to finish may still have to call one."""
    if any(w.device for w in m.workers.values()):
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
    WorkerIdle: lifecycle.worker_idle,
    GuestIdle: guests.guest_idle,
    ProcessDone: lifecycle.process_done,
    Checkpointed: lifecycle.checkpointed,
    WorkerHeld: lifecycle.worker_held,
    WorkerGone: lifecycle.worker_gone,
    Measured: _measured,
    KillAsked: asked.kill_asked,
    PauseAsked: asked.pause_asked,
    ResumeAsked: asked.resume_asked,
    ReniceAsked: asked.renice_asked,
    RestartAsked: asked.restart_asked,
    CheckpointAsked: asked.checkpoint_asked,
    InputGiven: guests.input_given,
    ShutdownAsked: _shutdown,
    Clock: _clock,
}
