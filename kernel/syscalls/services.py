"""`services`: what is served here, and restart one."""

from __future__ import annotations

import difflib
from typing import Any

from llmos.kernel import events as ev
from llmos.kernel import protocol
from llmos.kernel.connection import Connection
from llmos.kernel.errors import BadArgument, NoSuchThing
from llmos.kernel.kernel import Kernel
from llmos.kernel.process import State

UP_S = 30.0


async def handle(kernel: Kernel, request: protocol.Services, client: Connection) -> Any:
    await kernel.services_started.wait()
    if request.action == "ls":
        return [_shown(kernel, name) for name in sorted(kernel.service_pids)]
    if request.action != "restart":
        raise BadArgument(f"action is ls or restart, not {request.action!r}")
    if request.name not in kernel.service_pids:
        near = difflib.get_close_matches(request.name, kernel.service_pids, 1)
        hint = f"did you mean {near[0]}?" if near else "`llmos service ls` lists them"
        raise NoSuchThing(f"there is no service {request.name!r}", hint)
    pid = kernel.service_pids[request.name]
    before = kernel.core.m.find(pid).worker_id
    kernel.post(ev.RestartAsked(pid))
    await kernel.changed(pid, lambda p: p.state is State.RUNNING and p.worker_id != before, UP_S)
    return {"name": request.name, "pid": pid}


def _shown(kernel: Kernel, name: str) -> dict[str, Any]:
    proc = kernel.core.m.find(kernel.service_pids[name])
    worker = kernel.core.m.worker_of(proc)
    described = kernel.manifest["services"].get(name, {})
    return {
        "name": name,
        "pid": proc.pid,
        "state": str(proc.state),
        "os_pid": worker.os_pid if worker else None,
        "restarts": proc.restarts,
        "since": proc.started_at,
        "summary": described.get("summary", ""),
        "calls": described.get("calls", {}),
    }
