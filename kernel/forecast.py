"""What would become of a process if it were submitted now: for `--dry-run` and `explain`."""

from __future__ import annotations

from typing import Any

from llmos.kernel import admission, room
from llmos.kernel.kernel import Kernel
from llmos.kernel.machine import Machine
from llmos.kernel.process import Process


def of(kernel: Kernel, proc: Process) -> dict[str, Any]:
    """-> footprint, device, fits_now, free_bytes, would_move_out, starts."""
    m = kernel.core.m
    room.look_anew(m)
    devices = admission.place_for(m, proc)
    names = admission.devices_for(m, proc)
    chosen = devices or tuple(names[: proc.gang])
    found = None if devices else room.find_room(m, proc, names)
    return {
        "footprint": proc.segments,
        "total_bytes": proc.segments_bytes * proc.gang,
        "device": "+".join(chosen),
        "fits_now": bool(devices),
        "free_bytes": min(m.ledger.free(d) for d in chosen),
        "would_move_out": [
            {"pid": w.pid, "name": m.procs[w.pid].name, "bytes": m.ledger.private(w.pid)}
            for w in (found.victims if found is not None else ())
        ],
        "starts": starts(m, proc, bool(devices), found),
    }


def starts(m: Machine, proc: Process, fits: bool, found: room.Room | None) -> dict[str, Any]:
    """When it could start: {at, in_s, why}; `in_s` is None where nobody can tell."""
    ahead = [p for p in m.waiting if m.procs[p].cls <= proc.cls]
    if fits and not ahead:
        return {"at": "now", "in_s": 0.0, "why": "it fits"}
    if found is not None:
        who = ", ".join(str(w.pid) for w in found.victims) or "what is on its way out"
        return {"at": "soon", "in_s": round(found.cost_s / 2, 1), "why": f"{who} makes room"}
    ends = _first_end(m, proc)
    if ends is not None:
        return {"at": "when memory is free", "in_s": round(ends[0], 1),
                "why": f"process {ends[1]} is expected to end then"}  # fmt: skip
    return {"at": "when memory is free", "in_s": None,
            "why": "nobody can tell when the processes that hold it end"}  # fmt: skip


def _first_end(m: Machine, proc: Process) -> tuple[float, int] | None:
    """When the first process ends whose end lets `proc` in: (seconds from now, pid)."""
    found = []
    for device in admission.devices_for(m, proc):
        short = m.ledger.need(device, proc.segments) - m.ledger.free(device)
        queue = m.devices[device]
        for worker_id in m.on_device[device]:
            owner = m.procs[m.workers[worker_id].pid]
            if owner.predicted_s is None or m.ledger.would_free(owner.pid, device) < short:
                continue
            # Those that share the device with it take their turns meanwhile.
            found.append((owner.predicted_s / owner.gang * max(1, len(queue)), owner.pid))
    return min(found, default=None)
