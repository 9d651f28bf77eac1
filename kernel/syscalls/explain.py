"""`explain`: why a process is where it is, and what would change that."""

from __future__ import annotations

import time
from typing import Any

from llmos.kernel import access, admission, forecast, protocol, quota, room
from llmos.kernel.connection import Connection
from llmos.kernel.kernel import Kernel
from llmos.kernel.process import Process, Role, State

GIB = 1024**3

# So many lines of the kernel's log are shown.
LOG_LINES = 12


def handle(kernel: Kernel, request: protocol.Explain, client: Connection) -> dict[str, Any]:
    proc = kernel.core.m.find(request.pid)
    story = proc.story if access.is_own(client, proc) else []
    over = proc.live and quota.is_over(kernel.core.m, proc)
    return {
        "process": kernel.shown(proc, client),
        "reason": proc.reason if story or proc.live else "",
        "queue_place": _place(kernel, proc),
        "quota_opens_in_s": quota.opens_in(kernel.core.m, proc.uid) if over else None,
        "story": [{"at": at, "what": what, "why": why} for at, what, why in story],
        "advice": list(_advice(kernel, proc)),
        "log": _log(kernel, proc) if access.is_own(client, proc) else [],
    }


def _log(kernel: Kernel, proc: Process) -> list[dict[str, Any]]:
    """What the kernel's log has of it lately, each line with what set it off."""
    lines = kernel.dmesg.select(pid=proc.pid)[-LOG_LINES:]
    causes = kernel.dmesg.causes_of(lines)
    return [{**line, "because": causes.get(line["cause"] or 0, "")} for line in lines]


def _place(kernel: Kernel, proc: Process) -> int | None:
    """How many are before it in the line it stands in; None when it stands in none."""
    m = kernel.core.m
    if proc.pid in m.waiting:
        return m.waiting.before(proc.pid)
    if proc.state in (State.READY, State.PREEMPTED) and proc.device:
        holder = m.engine_of(proc) if proc.role is Role.GUEST else proc
        if holder is not None and holder.worker_id:
            return m.devices[proc.device].waiting_before(holder.worker_id)
    return None


def _advice(kernel: Kernel, proc: Process) -> Any:
    yield from _place_advice(kernel, proc)
    schema = kernel.manifest.get("programs", {}).get(proc.program, {})
    if schema.get("foreign") and proc.live:
        yield from _not_promised(proc)


def _not_promised(proc: Process) -> Any:
    """What the kernel cannot know of a command that somebody else has written."""
    promised = proc.memory.promised_bytes / GIB
    yield f"its memory is declared, not predicted ({promised:.2f} GiB are promised to it now)"
    if not proc.progress:
        yield "how far it is is not known: it does not say"
    if not proc.has_checkpoint:
        yield "it has no checkpoints: after a stop, a crash or a reboot it can only begin anew"
        yield "three lines in its script change that: docs/guides/your-own-script.md"


def _place_advice(kernel: Kernel, proc: Process) -> Any:
    m = kernel.core.m
    yield from _about_deadline(kernel, proc)
    if proc.pid in m.waiting:
        yield from (
            _about_quota(kernel, proc) if _by_quota(kernel, proc) else _about_memory(kernel, proc)
        )
    elif quota.is_over(m, proc) and proc.live:
        yield from _about_quota(kernel, proc)
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


def _about_memory(kernel: Kernel, proc: Process) -> Any:
    m = kernel.core.m
    names = admission.devices_for(m, proc)
    if not names:
        yield f"there is no device {proc.device_wanted!r} in this kernel"
        return
    device = names[0]
    need, free = m.ledger.need(device, proc.segments), m.ledger.free(device)
    each = f" on each of {proc.gang} devices" if proc.gang > 1 else f" on {device}"
    yield f"needs {need / GIB:.2f} GiB{each}; {free / GIB:.2f} GiB are free"
    for pid, held in m.ledger.holders(device):
        if not pid:
            continue
        owner = m.procs[pid]
        worker = m.worker_of(owner)
        what = "`llmos kill` would free it"
        if worker is not None and worker.leaving:
            what = "it is on its way out"
        elif owner.role is Role.PROCESS and room.movable(m, owner):
            what = f"`llmos pause --release {pid}` would free it"
        yield f"process {pid} holds {held / GIB:.2f} GiB: {what}"
    room.look_anew(m)
    when = forecast.starts(m, proc, False, room.find_room(m, proc, names))
    if when["in_s"] is not None:
        yield f"it could start in about {when['in_s']:.0f} s: {when['why']}"


def _by_quota(kernel: Kernel, proc: Process) -> bool:
    """Is it what its user has had that it waits for?"""
    return proc.reason == "quota" or quota.is_over(kernel.core.m, proc)


def _about_quota(kernel: Kernel, proc: Process) -> Any:
    m = kernel.core.m
    if quota.is_over(m, proc):
        in_s = quota.opens_in(m, proc.uid)
        at = time.strftime("%Y-%m-%d %H:%M", time.localtime(kernel.now() + in_s))
        yield f"{quota.why(m, proc.uid)}; it goes on in {in_s:.0f} s (at {at})"
        return
    for device in admission.devices_for(m, proc):
        held, most = quota.held_bytes(m, proc.uid, device), quota.allowed_bytes(m, device)
        yield (f"needs {proc.segments_bytes / GIB:.2f} GiB of {device}; processes of {proc.user} "
               f"are promised {held / GIB:.2f} of the {most / GIB:.2f} GiB that one user may "
               "have: it starts when they end")  # fmt: skip


def _about_deadline(kernel: Kernel, proc: Process) -> Any:
    if proc.deadline_at is None or not proc.live:
        return
    left = proc.deadline_at - kernel.now()
    if proc.predicted_s is None:
        yield f"its deadline is in {left:.0f} s; nobody knows yet how long it still takes"
    elif proc.predicted_s / proc.gang > left:
        yield (f"its deadline is in {left:.0f} s and cannot be met: it still needs "
               f"{proc.predicted_s / proc.gang:.0f} s of its device")  # fmt: skip
    else:
        yield (f"its deadline is in {left:.0f} s; it still needs "
               f"{proc.predicted_s / proc.gang:.0f} s of its device")  # fmt: skip
