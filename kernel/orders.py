"""How each order of the core is carried out: a table from order to function."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmos.kernel import events as ev
from llmos.kernel.process import Role, State

if TYPE_CHECKING:
    from llmos.kernel.kernel import Kernel


def executors(k: Kernel) -> dict[type[Any], Callable[[Any], None]]:
    """How each order is carried out."""

    def start(o: ev.StartWorker) -> None:
        proc = k.core.m.procs[o.pid]
        # The last words of an earlier attempt are not this one's.
        (k.home.work(o.pid) / "result.json").unlink(missing_ok=True)
        k.driver_of(o.worker_id).start(k.spec_of(proc, o.worker_id, o.device))

    def load(o: ev.Load) -> None:
        proc = k.core.m.procs[o.pid]
        info, driver = k.devices[proc.device]
        driver.send(
            o.worker_id,
            {"k": "load", "pid": proc.pid, "program": proc.program, "args": proc.args,
             "entry": k.schema_of(proc.program)["entry"], "work": str(k.home.work(proc.pid)),
             "home": str(k.home.path), "device": info.torch_device,
             "threads": int(proc.args.get("threads") or 0) or info.lanes},
        )  # fmt: skip

    def admit(o: ev.Admit) -> None:
        guest = k.core.m.procs[o.pid]
        work = k.home.work(o.pid)
        work.mkdir(parents=True, exist_ok=True, mode=0o700)
        k.driver_of(o.worker_id).send(
            o.worker_id,
            {"k": "admit", "pid": o.pid, "program": guest.program, "args": guest.args,
             "rank": list(guest.rank()), "sent": 0, "parked": guest.state is State.PAUSED,
             "work": str(work)},
        )  # fmt: skip

    def rank(o: ev.Rank) -> None:
        message = {"k": "rank", "pid": o.pid, "rank": list(k.core.m.procs[o.pid].rank())}
        k.driver_of(o.worker_id).send(o.worker_id, {**message, "parked": o.parked})

    def save(o: ev.Save) -> None:
        proc = k.core.m.procs[o.pid]
        # An attached generation is known to its engine and its client only; a service is
        # made anew at each boot.
        if proc.role is Role.SERVICE or (proc.role is Role.GUEST and proc.attached and proc.live):
            return
        k.journal.save(proc, k.worker_rows.get(proc.pid, {}))

    def forget(o: ev.Forget) -> None:
        k.journal.forget(o.pid)
        shutil.rmtree(k.home.work(o.pid), ignore_errors=True)
        k.wake(o.pid)

    def to(o: Any, message: dict[str, Any]) -> None:
        k.driver_of(o.worker_id).send(o.worker_id, message)

    return {
        ev.StartWorker: start,
        ev.Load: load,
        ev.Grant: lambda o: k.driver_of(o.worker_id).grant(o.worker_id, o.floor),
        ev.Hold: lambda o: k.driver_of(o.worker_id).hold(o.worker_id),
        ev.Stop: lambda o: to(o, {"k": "stop"}),
        ev.Signal: lambda o: k.driver_of(o.worker_id).signal(o.worker_id, o.signal),
        ev.AskCheckpoint: lambda o: to(o, {"k": "checkpoint"}),
        ev.Admit: admit,
        ev.Drop: lambda o: to(o, {"k": "drop", "pid": o.pid}),
        ev.Rank: rank,
        ev.Forward: lambda o: to(o, {"k": "input", "pid": o.pid, "message": o.message}),
        ev.Save: save,
        ev.Forget: forget,
        ev.Changed: lambda o: k.wake(o.pid),
        ev.WakeAt: lambda o: k.wake_at(o.at),
        ev.Record: lambda o: k.record(o.what, o.pid, o.why, o.by),
    }
