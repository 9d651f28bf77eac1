"""How each order of the core is carried out: a table from order to function."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmos.kernel import events as ev
from llmos.kernel.errors import LlmosError
from llmos.kernel.health import is_disks
from llmos.kernel.process import Process, Role, State
from llmos.kernel.rows import pack_row

if TYPE_CHECKING:
    from llmos.kernel.kernel import Kernel


def _start(k: Kernel, o: ev.StartWorker) -> None:
    try:
        _make_and_start(k, o)
    except (OSError, LlmosError) as exc:
        # After this pass over the orders: the core is in the middle of an event.
        asyncio.get_running_loop().call_soon(_start_failed, k, o, exc)


def _start_failed(k: Kernel, o: ev.StartWorker, exc: OSError | LlmosError) -> None:
    """When the disk is in trouble it waits, as if nobody had tried; else there is no use."""
    if isinstance(exc, OSError) and is_disks(exc):
        k.health.failed(exc)
    if is_disks(exc) or k.core.m.procs[o.pid].role is Role.SERVICE:
        k.post(ev.StartFailed(o.worker_id, _why(exc)))
    else:
        k.post(ev.GivenUp(o.pid, f"it could not be started: {_why(exc)}"))
        k.post(ev.WorkerGone(o.worker_id, None))
    k.clean_worker(o.worker_id)


def _why(exc: OSError | LlmosError) -> str:
    if isinstance(exc, LlmosError):
        return exc.message
    name = Path(exc.filename).name if isinstance(exc.filename, str) else ""
    why = exc.strerror or str(exc)
    return f"{name}: {why}" if name else why


def _make_and_start(k: Kernel, o: ev.StartWorker) -> None:
    proc = k.core.m.procs[o.pid]
    # The last words of an earlier attempt are not this one's.
    (k.home.work(o.pid) / "result.json").unlink(missing_ok=True)
    k.driver_of(o.worker_id).start(k.spec_of(proc, o.worker_id, o.devices))


def _load(k: Kernel, o: ev.Load) -> None:
    proc = k.core.m.procs[o.pid]
    if not proc.needs_device:
        k.driver_of(o.worker_id).send(o.worker_id, _load_message(k, proc, "", []))
        return
    info, driver = k.devices[proc.device]
    spanned = [k.devices[name][0] for name in proc.devices]
    # Equal threads on all ranks: the number of threads is part of the arithmetic.
    threads = int(proc.args.get("threads") or 0) or min(d.lanes for d in spanned)
    ranks = [{"device": d.torch_device, "threads": threads} for d in spanned]
    driver.send(o.worker_id, _load_message(k, proc, info.torch_device, ranks, threads))


def _load_message(
    k: Kernel, proc: Process, device: str, ranks: list[dict[str, Any]], threads: int = 1
) -> dict[str, Any]:
    return {
        "k": "load", "pid": proc.pid, "program": proc.program, "args": proc.args,
        "entry": k.schema_of(proc.program)["entry"], "work": str(k.home.work(proc.pid)),
        "home": str(k.home.path), "device": device,
        "copy": any(s["kind"] == "checkpoint" for s in proc.segments),
        "threads": threads, "ranks": ranks,
    }  # fmt: skip


def _admit(k: Kernel, o: ev.Admit) -> None:
    guest = k.core.m.procs[o.pid]
    work = k.home.work(o.pid)
    try:
        k.work_of(guest)
    except (OSError, LlmosError) as exc:
        if not isinstance(exc, OSError) or not is_disks(exc):
            # In its place, as the engine counts what it is told.
            _to(k, o, {"k": "drop", "pid": o.pid})
            k.later(ev.GivenUp(o.pid, f"it could not be admitted: {_why(exc)}"))
            return
        k.health.failed(exc)  # the engine makes it when it can
    row = _row_of(guest)
    if row:
        k.attached.add(o.pid, row)
    k.driver_of(o.worker_id).send(
        o.worker_id,
        {"k": "admit", "pid": o.pid, "program": guest.program, "args": guest.args,
         "rank": list(guest.rank()), "parked": guest.state is State.PAUSED,
         "work": str(work), "row": row},
    )  # fmt: skip


def _rank(k: Kernel, o: ev.Rank) -> None:
    guest = k.core.m.procs[o.pid]
    message = {"k": "rank", "pid": o.pid, "rank": list(guest.rank()), "row": _row_of(guest)}
    k.driver_of(o.worker_id).send(o.worker_id, {**message, "parked": o.parked})


def _row_of(guest: Process) -> bytes:
    """An attached guest is in no journal: a kernel that comes later hears of it by its engine."""
    return pack_row(guest, {}) if guest.attached else b""


def _save(k: Kernel, o: ev.Save) -> None:
    proc = k.core.m.procs[o.pid]
    if k.journaled(proc):
        k.journal.save(proc, k.worker_rows.get(proc.pid, {}))
        k.attached.drop(proc.pid)


def _forget(k: Kernel, o: ev.Forget) -> None:
    k.journal.forget(o.pid)
    k.attached.drop(o.pid)
    folder = k.home.work(o.pid)
    if folder.exists():  # gigabytes of checkpoints take a while
        k.spawn(asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True))
    k.wake(o.pid)


def _learned(k: Kernel, o: ev.Learned) -> None:
    proc = k.core.m.procs[o.pid]
    k.planner.measured(proc, o.peak_bytes)


def _to(k: Kernel, o: Any, message: dict[str, Any]) -> None:
    k.driver_of(o.worker_id).send(o.worker_id, message)


EXECUTORS: dict[type[Any], Callable[[Kernel, Any], None]] = {
    ev.StartWorker: _start,
    ev.Load: _load,
    ev.Grant: lambda k, o: k.driver_of(o.worker_id).grant(o.worker_id, o.floor),
    ev.Hold: lambda k, o: k.driver_of(o.worker_id).hold(o.worker_id),
    ev.Stop: lambda k, o: _to(k, o, {"k": "stop"}),
    ev.Limit: lambda k, o: k.driver_of(o.worker_id).limit(o.worker_id, o.nbytes),
    ev.Shrink: lambda k, o: _to(k, o, {"k": "shrink", "level": o.level}),
    ev.MoveOut: lambda k, o: _to(k, o, {"k": "move_out", "where": "host"}),
    ev.MoveIn: lambda k, o: _to(k, o, {"k": "move_in"}),
    ev.Signal: lambda k, o: k.driver_of(o.worker_id).signal(o.worker_id, o.signal),
    ev.AskCheckpoint: lambda k, o: _to(k, o, {"k": "checkpoint"}),
    ev.Admit: _admit,
    ev.Drop: lambda k, o: _to(k, o, {"k": "drop", "pid": o.pid}),
    ev.Rank: _rank,
    ev.Forward: lambda k, o: _to(
        k, o, {"k": "input", "pid": o.pid, "message": o.message, "key": o.key}
    ),
    ev.Save: _save,
    ev.Learned: _learned,
    ev.Forget: _forget,
    ev.Changed: lambda k, o: k.wake(o.pid),
    ev.WakeAt: lambda k, o: k.wake_at(o.at),
    ev.Record: lambda k, o: k.dmesg.write(o.what, o.pid, o.why, o.by),
}
