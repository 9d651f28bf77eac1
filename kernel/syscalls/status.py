"""`status`: the kernel, its devices and its helpers, in one look."""

from __future__ import annotations

import collections
import os
from importlib import metadata
from typing import Any

from llmos.kernel import protocol
from llmos.kernel.connection import Connection
from llmos.kernel.kernel import Kernel


def handle(kernel: Kernel, request: protocol.Status, client: Connection) -> dict[str, Any]:
    now = kernel.now()
    states = collections.Counter(str(p.state) for p in kernel.core.m.procs.values() if p.live)
    return {
        "kernel": {
            "os_pid": os.getpid(),
            "uptime_s": round(now - kernel.started, 3),
            "version": metadata.version("llmos"),
            "home": str(kernel.home.path),
            "policy": kernel.config.policy,
        },
        "devices": [_device(kernel, name, now) for name in kernel.devices],
        "zygote": next(
            (d.statistics() for k, d in kernel.drivers.items() if k != "host"), {"state": "none"}
        ),
        "processes": dict(states),
        "adopting": kernel.adoption.pending(),
        "clients": len(kernel.clients),
        "journal": {
            "commits": kernel.journal.commits,
            "error": kernel.journal.failed or None,
            "mode": kernel.journal.mode,
            "set_aside": sorted(kernel.journal.aside),
        },
        "disk": {
            "kind": kernel.health.disk.kind,
            "network": kernel.health.disk.network,
            "free_bytes": kernel.health.free_bytes,
            "trouble": kernel.health.trouble or None,
        },
    }


def _device(kernel: Kernel, name: str, now: float) -> dict[str, Any]:
    info, _ = kernel.devices[name]
    queue = kernel.core.m.devices[name]
    holders = [kernel.core.m.workers[w].pid for w in queue.leases]
    busy = queue.busy_until(now)
    return {
        "device": name,
        "kind": info.kind,
        "lanes": info.lanes,
        "capacity_bytes": info.capacity_bytes,
        "found": f"{kernel.config.devices_from or 'found'}: {info.why}",
        "running_pid": holders[0] if holders else None,
        "running_pids": holders,
        "load": round(queue.load(now), 3),
        "busy_s": round(busy, 3),
        "idle_s": round(now - queue.started_at - busy, 3),
        "processes": sum(name in p.devices and p.live for p in kernel.core.m.procs.values()),
    }
