"""What drivers and workers say, checked and turned into events of the core.

A worker is not trusted to be right: a message that makes no sense is logged and dropped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmos.drivers.base import (
    DriverEvent,
    PlanMade,
    WorkerCame,
    WorkerEnded,
    WorkerHeld,
    WorkerSaid,
)
from llmos.kernel import events as ev
from llmos.kernel.errors import LlmosError
from llmos.kernel.log import log
from llmos.kernel.process import Role

if TYPE_CHECKING:
    from llmos.kernel.kernel import Kernel


class Inbox:
    def __init__(self, kernel: Kernel) -> None:
        self._k = kernel

    def take(self, event: DriverEvent) -> None:
        if isinstance(event, PlanMade):
            self._k.planned(event.ticket, event.segments, event.error)
            return
        worker = self._k.core.m.workers.get(event.worker_id)
        if worker is None:
            return
        match event:
            case WorkerCame():
                self._came(event)
            case WorkerSaid():
                self._said(event)
            case WorkerHeld():
                self._k.post(ev.WorkerHeld(event.worker_id))
            case WorkerEnded():
                self._ended(event)

    def _came(self, e: WorkerCame) -> None:
        k = self._k
        worker = k.core.m.workers[e.worker_id]
        if worker.up:
            return  # the line was broken and mended: nothing has changed
        driver = k.driver_of(e.worker_id)
        proc = k.core.m.procs[worker.pid]
        if proc.role is not Role.SERVICE:
            k.worker_rows[proc.pid] = {
                "worker_id": e.worker_id, "device": worker.device, "os_pid": e.os_pid,
                "started": driver.started(e.os_pid),
            }  # fmt: skip
        guests = {int(pid) for pid in e.hello.get("guests", ())}
        if e.adopted:
            driver.hold(e.worker_id)  # until it is its turn
            # Whom the earlier kernel had not handed over yet is not in it.
            worker.admitted &= guests
            worker.admits_sent = int(e.hello.get("seen", 0))
        loaded = bool(e.hello.get("loaded"))
        k.post(ev.WorkerUp(e.worker_id, e.os_pid, loaded))
        if e.adopted:
            # Those whose clients went with the earlier kernel are nobody's any more.
            for pid in sorted(guests - worker.admitted):
                if pid not in k.core.m.procs or not k.core.m.procs[pid].live:
                    worker.admits_sent += 1
                    k.carry_out([ev.Drop(e.worker_id, pid)])
            for pid in e.hello.get("waiting", ()):
                k.post(ev.GuestIdle(e.worker_id, int(pid)))
        k.carry_out([ev.Save(proc.pid)])

    def _ended(self, e: WorkerEnded) -> None:

        k = self._k
        worker = k.core.m.workers[e.worker_id]
        proc = k.core.m.procs[worker.pid]
        if worker.done is None and proc.role is Role.PROCESS and not worker.kill_signal:
            last = result_of(k.home.work(proc.pid))
            if last is not None:
                self._done(e.worker_id, proc.pid, last)
        k.worker_rows.pop(proc.pid, None)
        k.post(ev.WorkerGone(e.worker_id, e.status))
        k.clean_worker(e.worker_id)
        k.calls.failed(e.worker_id)

    def _done(self, worker_id: str, pid: int, m: dict[str, Any]) -> None:
        status, reason = int(m.get("status", 1)), str(m.get("reason", ""))
        result = m.get("result")
        self._k.post(
            ev.ProcessDone(
                worker_id, pid, status, reason, result if isinstance(result, dict) else {}
            )
        )

    def _said(self, e: WorkerSaid) -> None:
        try:
            self._understand(e.worker_id, e.message)
        except (KeyError, TypeError, ValueError, LlmosError) as exc:
            log(f"worker {e.worker_id} said what makes no sense: {exc!r} in {str(e.message)[:200]}")

    def _understand(self, worker_id: str, m: dict[str, Any]) -> None:
        k = self._k
        pid = k.core.m.workers[worker_id].pid
        match m["k"]:
            case "report":
                for marked in m["marks"]:
                    k.growth.grown(marked)
                total = None if m["total"] is None else int(m["total"])
                metrics = {str(a): float(b) for a, b in m["metrics"].items()}
                shares = {int(a): float(b) for a, b in m["shares"].items()}
                k.post(ev.Reported(worker_id, int(m["step"]), total, metrics, shares))
            case "mark":
                k.growth.grown(int(m["pid"]))
            case "loaded":
                k.post(ev.Loaded(worker_id))
            case "idle":
                k.post(ev.WorkerIdle(worker_id, int(m["seen"])))
            case "guest_idle":
                seen = m.get("seen")
                k.post(ev.GuestIdle(worker_id, int(m["pid"]), None if seen is None else int(seen)))
            case "guest_done":
                self._done(worker_id, int(m["pid"]), m)
            case "done":
                self._done(worker_id, pid, m)
            case "checkpointed":
                k.post(ev.Checkpointed(worker_id, str(m["folder"]), int(m["step"])))
            case "call":
                k.spawn(self._call(worker_id, m))
            case "answer":
                k.calls.answered(int(m["id"]), m)

    async def _call(self, worker_id: str, m: dict[str, Any]) -> None:
        """A program calls a service."""
        k = self._k
        try:
            answer = {"ok": await k.calls.call(str(m["method"]), dict(m["args"]), 60.0)}
        except LlmosError as exc:
            answer = {"error": exc.to_wire()}
        if worker_id in k.core.m.workers:
            k.driver_of(worker_id).send(worker_id, {"k": "answer", "id": m["id"], **answer})


def result_of(work: Path) -> dict[str, Any] | None:
    """What a program left as its last words, if it came that far."""
    try:
        found: dict[str, Any] = json.loads((work / "result.json").read_text())
    except (OSError, ValueError):
        return None
    return found
