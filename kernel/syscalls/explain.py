"""`explain`: why a process is where it is, and what would change that."""

from __future__ import annotations

from typing import Any

from llmos.kernel import protocol
from llmos.kernel.connection import Connection
from llmos.kernel.kernel import Kernel
from llmos.kernel.process import Process, Role, State

GIB = 1024**3


def handle(kernel: Kernel, request: protocol.Explain, client: Connection) -> dict[str, Any]:
    proc = kernel.core.m.find(request.pid)
    return {
        "process": kernel.shown(proc),
        "reason": proc.reason,
        "queue_place": _place(kernel, proc),
        "story": [{"at": at, "what": what, "why": why} for at, what, why in proc.story],
        "advice": list(_advice(kernel, proc)),
    }


def _place(kernel: Kernel, proc: Process) -> int | None:
    """How many are before it in the line it stands in; None when it stands in none."""
    m = kernel.core.m
    if proc.pid in m.waiting:
        before = [p for p in m.waiting if (m.procs[p].cls, p) < (proc.cls, proc.pid)]
        return len(before)
    if proc.state in (State.READY, State.PREEMPTED) and proc.device:
        holder = m.engine_of(proc) if proc.role is Role.GUEST else proc
        if holder is not None and holder.worker_id:
            return m.devices[proc.device].waiting_before(holder.worker_id)
    return None


def _advice(kernel: Kernel, proc: Process) -> Any:
    m = kernel.core.m
    if proc.pid in m.waiting:
        need = sum(s["bytes"] for s in proc.segments)
        device = proc.device_wanted or max(m.devices, key=m.ledger.free)
        free = m.ledger.free(device)
        yield f"needs {need / GIB:.2f} GiB on {device}; {free / GIB:.2f} GiB are free"
        for pid, held in m.ledger.holders(device):
            if pid:
                yield f"process {pid} holds {held / GIB:.2f} GiB: `llmos kill {pid}` would free it"
    elif proc.state is State.PAUSED:
        yield f"`llmos resume {proc.pid}` lets it go on"
    elif proc.state is State.WAITING and proc.reason == "input":
        yield "it waits for the next turn of its user"
    elif proc.state in (State.READY, State.PREEMPTED) and proc.device:
        lease = m.devices[proc.device].lease
        if lease is not None:
            other = m.procs[m.workers[lease.worker_id].pid]
            yield (f"{proc.device} is with process {other.pid} ({other.cls.word}, nice "
                   f"{other.nice}); `llmos renice` changes who goes first")  # fmt: skip
    elif not proc.live and proc.exit_status:
        yield f"`llmos logs {proc.pid}` shows what it printed"
