"""Admission: a process starts when its promise fits in the books, not before.

Waiting processes are tried by class, then in the order they came. A smaller one may pass a
larger one that does not fit, but not for ever: after a while nobody of its class passes it.
"""

from __future__ import annotations

from llmos.kernel.errors import NoMemory
from llmos.kernel.events import Signal, StartWorker
from llmos.kernel.machine import Machine, Worker
from llmos.kernel.process import Process, Residency, Role, State

# How long a process that does not fit may be passed by smaller ones of its class.
PASSING_S = 60.0

GIB = 1024**3


def devices_for(m: Machine, proc: Process) -> list[str]:
    if proc.device_wanted:
        # A kernel may have been booted without the device that an earlier one had.
        return [proc.device_wanted] if proc.device_wanted in m.devices else []
    return sorted(m.devices, key=lambda d: (-m.ledger.free(d), d))


def refuse_what_never_fits(m: Machine, proc: Process) -> None:
    """Raise NoMemory when no device could hold the process even if all others left."""
    names = devices_for(m, proc)
    if any(m.ledger.can_ever_reserve(d, proc.segments) for d in names):
        return
    need = sum(s["bytes"] for s in proc.segments)
    largest = max(names, key=m.ledger.capacity)
    raise NoMemory(
        f"{proc.program} needs {need / GIB:,.1f} GiB; {largest} has "
        f"{m.ledger.capacity(largest) / GIB:,.1f} GiB in all",
        "make it smaller (batch, context, width, dtype) or boot with a larger device",
    )


def admit_waiting(m: Machine) -> None:
    """Start whatever fits now."""
    if m.shutting_down:
        return
    # Where somebody of a class has waited too long to be passed.
    closed: set[tuple[int, str]] = set()
    for proc in sorted((m.procs[p] for p in m.waiting), key=lambda p: (int(p.cls), p.pid)):
        devices = devices_for(m, proc)
        open_ = [d for d in devices if (int(proc.cls), d) not in closed]
        if devices and not open_:
            continue
        device = next((d for d in open_ if m.ledger.can_reserve(d, proc.segments)), None)
        if device is not None:
            start(m, proc, device)
            continue
        proc.reason = "memory" if devices else "device"
        make_room(m, proc)
        if m.now - proc.submitted_at > PASSING_S:
            could = [d for d in devices if m.ledger.can_ever_reserve(d, proc.segments)]
            closed.update((int(proc.cls), d) for d in could)


def start(m: Machine, proc: Process, device: str) -> None:
    """Promise the memory and have a worker forked."""
    m.waiting.pop(proc.pid, None)
    if device:
        m.ledger.reserve(device, proc.pid, proc.segments)
    worker = Worker(f"w{proc.pid}-{m.next_worker}", proc.pid, device)
    m.next_worker += 1
    m.workers[worker.worker_id] = worker
    proc.worker_id, proc.device = worker.worker_id, device
    proc.next_start_at = None
    show_promise(m, proc)
    m.move(proc, State.STARTING, f"memory is promised on {device}" if device else "service")
    proc.residency = Residency.DEVICE
    m.out.append(StartWorker(worker.worker_id, proc.pid, device))
    m.record("started", proc.pid)
    m.save(proc)


def make_room(m: Machine, proc: Process) -> None:
    """End idle engines, the longest idle first, as far as that lets `proc` in."""
    for device in devices_for(m, proc):
        short = m.ledger.need(device, proc.segments) - m.ledger.free(device)
        idle = sorted(
            (w for w in m.workers.values() if w.device == device and w.idle_since is not None),
            key=lambda w: w.idle_since or 0.0,
        )
        leaving = [w for w in m.workers.values() if w.device == device and w.kill_signal]
        short -= sum(m.ledger.memory_of(w.pid)[0] for w in leaving)
        if short <= 0 or short > sum(m.ledger.memory_of(w.pid)[0] for w in idle):
            continue
        for worker in idle:
            if short <= 0:
                return
            short -= m.ledger.memory_of(worker.pid)[0]
            end_engine(m, worker, f"makes room for process {proc.pid}")
        return


def end_engine(m: Machine, worker: Worker, why: str) -> None:
    """An engine without work leaves: there is nothing in it to be saved."""
    if not worker.kill_signal:
        worker.kill_signal, worker.kill_why = 15, why
        m.retire(m.procs[worker.pid])
        m.out.append(Signal(worker.worker_id, 15))


def show_promise(m: Machine, proc: Process) -> None:
    """Copy what the books say about a process into the table."""
    promised, measured, peak, kinds = m.ledger.memory_of(proc.pid)
    proc.memory.promised_bytes, proc.memory.measured_bytes = promised, measured
    proc.memory.peak_bytes, proc.memory.by_kind = max(peak, proc.memory.peak_bytes), kinds


def wait_for_memory(m: Machine, proc: Process) -> None:
    """Put a process in the line for memory; services need none on a device."""
    proc.reason = "memory"
    if proc.role is Role.SERVICE:
        if not m.shutting_down:
            start(m, proc, "")
        return
    m.waiting[proc.pid] = None
