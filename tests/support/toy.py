"""A toy world around the real core: orders are carried out in virtual time, without any I/O.

After every event the core's invariants are checked. What a worker does follows from its process's
arguments: `steps`, `step_s`, `bytes`, `tokens` (of a guest).
"""

from __future__ import annotations

import heapq
import itertools
from typing import Any

from llmos.kernel import events as ev
from llmos.kernel.core import Core
from llmos.kernel.policies.base import Policy
from llmos.kernel.process import Class, Process, Role, State
from llmos.kernel.settings import Settings

HOLD_S, START_S, LOAD_S, MOVE_S = 0.001, 0.01, 0.02, 0.05


class Toy:
    def __init__(
        self,
        capacity: int = 1000,
        devices: int = 1,
        policy: Policy | None = None,
        moves_to: str = "disk",
        lanes: int = 1,
        **settings: Any,
    ) -> None:
        self.now = 100.0
        # No share for batch unless a test asks for it: strict classes are simpler to follow.
        chosen = {"batch_share": 0.0, **settings}
        self.core = Core(self.now, policy, Settings(**chosen))
        for n in range(devices):
            self.core.add_device(f"sim{n}", "sim", capacity, lanes, moves_to)
        self.orders: list[ev.Order] = []
        self.records: list[ev.Record] = []
        self._agenda: list[tuple[float, int, Any]] = []
        self._seq = itertools.count()
        self._pids = itertools.count(1)
        self._steps: dict[str, int] = {}  # worker -> steps done
        self._left: dict[str, float] = {}  # worker -> seconds left of its step
        self._running: dict[str, tuple[float, int]] = {}  # worker -> (since, token of its timer)
        self._guests: dict[str, dict[int, int]] = {}  # worker -> guest -> tokens to go
        self._loaded: set[str] = set()
        self._seen: dict[str, int] = {}
        self._parked: set[int] = set()
        self._said: dict[int, int] = {}  # guest -> tokens of its turn that are in its stream
        self._holds: dict[str, int] = {}  # worker -> token of the hold that is under way

    # ---- what a test does ----

    def submit(
        self,
        steps: int = 10,
        step_s: float = 0.1,
        nbytes: int = 100,
        cls: Class = Class.BATCH,
        nice: int = 0,
        uid: int = 0,
        **more: Any,
    ) -> int:
        pid = next(self._pids)
        args = {"steps": steps, "step_s": step_s}
        proc = Process(pid, "spin", args, "u", uid, self.now, cls=cls, nice=nice, **more)
        proc.has_checkpoint = True
        self.do(ev.Submitted(proc))
        self.do(ev.Planned(pid, [{"kind": "activations", "bytes": nbytes, "shared": ""}]))
        return pid

    def submit_guest(
        self,
        model: str = "m",
        tokens: int = 5,
        cls: Class = Class.INTERACTIVE,
        nice: int = 0,
        turns: bool = False,
        uid: int = 0,
    ) -> int:
        engine = None
        if model not in self.core.m.engines:
            engine = Process(
                next(self._pids), "engine", {"keep_alive_s": 10.0, "step_s": 0.01}, "u", 0,
                self.now, role=Role.ENGINE, engine_key=model,
            )  # fmt: skip
        pid = next(self._pids)
        guest = Process(
            pid, "infer", {"tokens": tokens, "turns": turns}, "u", uid, self.now,
            role=Role.GUEST, engine_key=model, cls=cls, nice=nice,
        )  # fmt: skip
        self.do(ev.Submitted(guest, engine))
        if engine is not None:
            self.do(ev.Planned(engine.pid, [{"kind": "weights", "bytes": 200, "shared": "f"}]))
        return pid

    def load(self, model: str = "m", keep_s: float = 10.0) -> int:
        """An engine that is to be loaded before it has a guest; or the one that there is."""
        if model in self.core.m.engines:
            self.do(ev.KeepAsked(self.core.m.engines[model], keep_s))
            return self.core.m.engines[model]
        pid = next(self._pids)
        engine = Process(
            pid, "engine", {"keep_alive_s": keep_s, "step_s": 0.01}, "u", 0, self.now,
            role=Role.ENGINE, engine_key=model, preload=True, cls=Class.INTERACTIVE,
        )  # fmt: skip
        self.do(ev.Submitted(engine))
        self.do(ev.Planned(pid, [{"kind": "weights", "bytes": 200, "shared": "f"}]))
        return pid

    def do(self, event: ev.Event) -> list[ev.Order]:
        orders = self.core.handle(event, self.now)
        self.core.check()
        for order in orders:
            self.orders.append(order)
            self._carry_out(order)
        return orders

    def run(self, seconds: float) -> None:
        """Let virtual time pass."""
        end = self.now + seconds
        while self._agenda and self._agenda[0][0] <= end:
            at, _, work = heapq.heappop(self._agenda)
            self.now = max(self.now, at)
            work()
        self.now = end
        self.do(ev.Clock())

    def proc(self, pid: int) -> Process:
        return self.core.m.procs[pid]

    def state(self, pid: int) -> State:
        return self.proc(pid).state

    def worker(self, pid: int) -> str:
        return self.proc(pid).worker_id

    def die(self, pid: int, status: int | None = 137) -> None:
        """The worker of a process is killed from outside."""
        worker = self.worker(pid)
        self._forget(worker)
        self.do(ev.WorkerGone(worker, status))

    # ---- the world ----

    def _at(self, delay: float, work: Any) -> None:
        heapq.heappush(self._agenda, (self.now + delay, next(self._seq), work))

    def _lives(self, worker: str) -> bool:
        return worker in self.core.m.workers

    def _post(self, delay: float, worker: str, event: ev.Event) -> None:
        self._at(delay, lambda: self.do(event) if self._lives(worker) else None)

    def _carry_out(self, o: ev.Order) -> None:
        match o:
            case ev.StartWorker():
                self._post(START_S, o.worker_id, ev.WorkerUp(o.worker_id, 7))
            case ev.Load():
                self._at(LOAD_S, lambda: self._load(o.worker_id))
            case ev.Grant():
                self._holds.pop(o.worker_id, None)
                self._begin(o.worker_id)
            case ev.Hold():
                self._hold(o.worker_id)
            case ev.Signal():
                self._forget(o.worker_id)
                gone = ev.WorkerGone(o.worker_id, 128 + o.signal)
                self._post(HOLD_S, o.worker_id, gone)
            case ev.Stop():
                self._stop(o.worker_id)
            case ev.MoveOut():
                self._running.pop(o.worker_id, None)
                moved = ev.MovedOut(o.worker_id, "host", 90, 10, MOVE_S)
                self._post(MOVE_S, o.worker_id, moved)
            case ev.MoveIn():
                self._post(MOVE_S, o.worker_id, ev.MovedIn(o.worker_id, MOVE_S))
            case ev.Shrink():
                self._post(HOLD_S, o.worker_id, ev.Shrunk(o.worker_id, o.level, 0))
            case ev.Admit():
                self._seen[o.worker_id] = self._seen.get(o.worker_id, 0) + 1
                guest = self.proc(o.pid)
                said = self._said.get(o.pid, 0)  # to an engine before this one
                to_go = int(guest.args["tokens"]) - said
                self._guests.setdefault(o.worker_id, {})[o.pid] = to_go
                parked = guest.state is State.PAUSED
                (self._parked.add if parked else self._parked.discard)(o.pid)
            case ev.Rank():
                (self._parked.add if o.parked else self._parked.discard)(o.pid)
            case ev.Forward():
                self._seen[o.worker_id] = self._seen.get(o.worker_id, 0) + 1
                if o.pid in self._guests.get(o.worker_id, {}):
                    self._guests[o.worker_id][o.pid] = int(self.proc(o.pid).args["tokens"])
                self._said.pop(o.pid, None)
            case ev.Drop():
                self._seen[o.worker_id] = self._seen.get(o.worker_id, 0) + 1
                self._guests.get(o.worker_id, {}).pop(o.pid, None)
            case ev.WakeAt():
                self._at(max(0.0, o.at - self.now), lambda: self.do(ev.Clock()))
            case ev.Record():
                self.records.append(o)

    def _load(self, worker: str) -> None:
        if self._lives(worker):
            self._loaded.add(worker)
            self.do(ev.Loaded(worker))
            if self._lives(worker) and self._leased(worker):
                self._begin(worker)

    def _begin(self, worker: str) -> None:
        """Work on the current step until it is done or the worker is held."""
        if not self._lives(worker) or worker in self._running or worker not in self._loaded:
            return
        proc = self.core.m.procs[self.core.m.workers[worker].pid]
        left = self._left.setdefault(worker, float(proc.args["step_s"]))
        token = next(self._seq)
        self._running[worker] = (self.now, token)
        self._at(left, lambda: self._step(worker, token))

    def _hold(self, worker: str) -> None:
        running = self._running.pop(worker, None)
        if running is not None:
            self._left[worker] -= self.now - running[0]
        token = self._holds[worker] = next(self._seq)

        def held() -> None:
            if self._lives(worker) and self._holds.get(worker) == token:
                del self._holds[worker]
                self.do(ev.WorkerHeld(worker))

        self._at(HOLD_S, held)

    def _step(self, worker: str, token: int) -> None:
        if self._running.get(worker, (0, -1))[1] != token or not self._lives(worker):
            return
        del self._running[worker]
        self._left.pop(worker)
        proc = self.core.m.procs[self.core.m.workers[worker].pid]
        if proc.role is Role.ENGINE:
            self._token(worker)
        else:
            self._advance(worker, proc)
        if self._lives(worker) and self._leased(worker):
            self._begin(worker)

    def _leased(self, worker: str) -> bool:
        if not self.core.m.workers[worker].devices:
            return True  # it needs none
        queue = self.core.m.devices[self.core.m.workers[worker].device]
        lease = queue.leases.get(worker)
        return lease is not None and not lease.holding

    def _advance(self, worker: str, proc: Process) -> None:
        done = self._steps[worker] = self._steps.get(worker, 0) + 1
        total = int(proc.args["steps"])
        self.do(ev.Reported(worker, done, total, {}))
        if done >= total and self._lives(worker):
            self.do(ev.ProcessDone(worker, proc.pid, 0, "", {}))
            self._forget(worker)
            self._post(HOLD_S, worker, ev.WorkerGone(worker, 0))

    def _token(self, worker: str) -> None:
        guests = self._guests.get(worker, {})
        floor = self.core.m.workers[worker].floor
        runnable = [
            g
            for g, to_go in guests.items()
            if to_go and g not in self._parked and self.proc(g).rank()[0] <= floor
        ]
        if not runnable:
            self.do(ev.WorkerIdle(worker, self._seen.get(worker, 0)))
            return
        pid = min(runnable, key=lambda g: self.proc(g).rank())
        guests[pid] -= 1
        self._said[pid] = int(self.proc(pid).args["tokens"]) - guests[pid]
        self.do(ev.Reported(worker, 1, None, {}, {pid: 1.0}))
        if guests.get(pid) == 0 and self.proc(pid).args["turns"]:
            self.do(ev.GuestIdle(worker, pid))
        elif guests.get(pid) == 0:
            del guests[pid]
            self.do(ev.ProcessDone(worker, pid, 0, "", {"tokens": 1}))

    def _stop(self, worker: str) -> None:
        step = self._steps.get(worker, 0)
        self._forget(worker)
        self._post(HOLD_S, worker, ev.Checkpointed(worker, f"/ck/step-{step}", step))
        self._post(2 * HOLD_S, worker, ev.WorkerGone(worker, 0))

    def _forget(self, worker: str) -> None:
        self._holds.pop(worker, None)
        self._running.pop(worker, None)
        self._loaded.discard(worker)
