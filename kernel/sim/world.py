"""A world of simulated devices around the real core, in virtual time.

The core gets events and gives orders, as it does live; here the orders are carried out by
arithmetic. A job reports nothing while it runs: its progress is accounted when it is granted its
devices and when it is held, so a job costs a handful of events, however long it is.

- A worker is up at once, holds at once, and loads at once; after a move out it first makes up for
  `resume_s` seconds on its devices.
- A worker that is to move out goes on to its next safepoint (`step_s` of its job), then is gone.
- What the core wants to be woken for, it says in its alarms: they are looked at, not copied.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from llmos.kernel import events as ev
from llmos.kernel.core import Core
from llmos.kernel.errors import NoMemory
from llmos.kernel.policies.base import Policy
from llmos.kernel.process import Process
from llmos.kernel.settings import Settings
from llmos.kernel.sim.devices import SimDevice
from llmos.kernel.sim.jobs import SimJob

# Work below this many seconds is done: sums of floats do not reach zero.
_DONE_S = 1e-6


@dataclass(slots=True)
class Run:
    """How a job fares. `left_s`: seconds on its devices that it still needs."""

    job: SimJob
    left_s: float
    worker_id: str = ""
    running_since: float | None = None
    token: int = 0  # of its timer: an older one says nothing
    started_at: float | None = None
    ended_at: float | None = None
    ran_s: float = 0.0  # seconds that it had its devices
    holds: int = 0  # how often it was taken off them before its end
    moves: int = 0  # how often it was moved out of memory
    refused: str = ""  # why it can never run here


@dataclass(frozen=True, slots=True)
class Choices:
    """What a simulation is told besides its trace and devices."""

    job_memory_bytes: int = 0  # of a job that says nothing; 0: a whole device
    resume_s: float = 0.0
    oracle: bool = False  # predictions are the truth
    check: bool = False  # the core's invariants after every event


@dataclass(slots=True)
class Outcome:
    """What a simulation gives: the runs in order of their jobs, and the devices' time."""

    runs: list[Run]
    devices: int
    makespan_s: float
    busy_s: float  # device-seconds, as the core's books have them
    events: int = 0
    failed_policy: str = ""  # what a policy raised; it was replaced by the default


@dataclass
class World:
    """One simulation. `run` may be called once."""

    jobs: Sequence[SimJob]
    devices: Sequence[SimDevice]
    policy: Policy | None = None
    choices: Choices = field(default_factory=Choices)
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        self.core = Core(0.0, self.policy, self.settings)
        for device in self.devices:
            self.core.add_device(device.name, "sim", device.capacity_bytes)
        self._smallest = min(d.capacity_bytes for d in self.devices)
        self._runs = [Run(job, job.duration_s) for job in self.jobs]
        self._on: dict[str, Run] = {}  # worker -> whose
        self._timers: list[tuple[float, int, Run, str]] = []
        self._tokens = 0
        self._pending: deque[ev.Event] = deque()
        self._now = 0.0
        self._events = 0
        self._arrived = 0
        self._failed = ""

    def run(self) -> Outcome:
        while self._arrived < len(self.jobs) or self._timers:
            self._advance()
        last = max((r.ended_at or 0.0 for r in self._runs), default=0.0)
        busy = sum(q.busy_s for q in self.core.m.devices.values())
        outcome = Outcome(self._runs, len(self.devices), last, busy, self._events, self._failed)
        self._add_up(outcome)
        return outcome

    # ---- time ----

    def _advance(self) -> None:
        """Go to the next moment at which something happens, and let it happen."""
        arrival = self._next_arrival()
        timer = self._timers[0][0] if self._timers else math.inf
        alarm = self.core.m.alarms[0][0] if self.core.m.alarms else math.inf
        at = min(arrival, timer, alarm)
        self._now = max(self._now, at)
        if timer == at:
            _, token, run, what = heapq.heappop(self._timers)
            if run.token == token:
                self._timer(run, what)
        elif arrival == at:
            self._arrive()
        else:
            self._do(ev.Clock())

    def _next_arrival(self) -> float:
        return self.jobs[self._arrived].submit_s if self._arrived < len(self.jobs) else math.inf

    def _do(self, event: ev.Event) -> None:
        """Tell the core, carry out what it wants, and so on until nothing more is wanted."""
        self._pending.append(event)
        self._drain()

    def _drain(self) -> None:
        while self._pending:
            self._handle(self._pending.popleft())

    def _handle(self, event: ev.Event) -> None:
        self._events += 1
        orders = self.core.handle(event, self._now)
        if self.choices.check:
            self.core.check()
        for order in orders:
            self._carry_out(order)

    # ---- jobs come ----

    def _arrive(self) -> None:
        run = self._runs[self._arrived]
        self._arrived += 1
        pid, job = self._arrived, run.job
        proc = Process(
            pid, job.program, {}, job.user, 0, self._now, cls=job.cls, nice=job.nice,
            gang=job.devices, has_checkpoint=True,
        )  # fmt: skip
        if self.choices.oracle:
            proc.predicted_s = job.duration_s * job.devices
            self._foresee()
        self._do(ev.Submitted(proc))
        try:
            self._do(ev.Planned(pid, self._segments(job)))
        except NoMemory as exc:
            run.refused = exc.message

    def _segments(self, job: SimJob) -> list[dict[str, object]]:
        """What it needs of each of its devices."""
        own = job.memory_bytes or int(job.memory_share * self._smallest)
        if not own:
            own = self.choices.job_memory_bytes or self._smallest
        segments: list[dict[str, object]] = [{"kind": "job", "bytes": own, "shared": ""}]
        if job.shared_bytes:
            weights = {"kind": "weights", "bytes": job.shared_bytes, "shared": job.model}
            segments.append(weights)
        return segments

    def _foresee(self) -> None:
        """Bring the predictions of what runs up to date: who comes may be compared with them."""
        for run in self._on.values():
            proc = self.core.m.procs[self.core.m.workers[run.worker_id].pid]
            proc.predicted_s = self._left(run) * run.job.devices

    # ---- orders ----

    def _carry_out(self, order: ev.Order) -> None:
        match order:
            case ev.StartWorker(worker_id=worker, pid=pid):
                self._runs[pid - 1].worker_id = worker
                self._on[worker] = self._runs[pid - 1]
                self._pending.append(ev.WorkerUp(worker, pid))
            case ev.Load(worker_id=worker):
                run = self._on[worker]
                run.left_s += self.choices.resume_s if run.moves else 0.0
                self._pending.append(ev.Loaded(worker))
            case ev.Grant(worker_id=worker):
                self._begin(self._on.get(worker))
            case ev.Hold(worker_id=worker):
                held = self._on.get(worker)
                if held is None:
                    return  # an order before this one moved it out
                held.holds += self._pause(held)
                self._pending.append(ev.WorkerHeld(worker))
            case ev.Stop(worker_id=worker):
                self._stop(self._on[worker])
            case ev.Record(what="policy-failed"):
                self._failed = order.why
            case ev.Signal(worker_id=worker, signal=number):
                self._leave(worker, 128 + number)

    def _begin(self, run: Run | None) -> None:
        """It has its devices. Twice is harmless; so is one who has ended."""
        if run is None or run.running_since is not None or run.left_s <= 0:
            return
        run.running_since = self._now
        if run.started_at is None:
            run.started_at = self._now
        # From here on progress counts, even though the core's Load comes with the same orders.
        self._set_timer(run, run.left_s, "done")

    def _pause(self, run: Run) -> bool:
        """It has its devices no more -> whether it was using them."""
        if run.running_since is None:
            return False
        run.left_s = self._left(run)
        run.ran_s += self._now - run.running_since
        run.running_since, run.token = None, 0
        return True

    def _left(self, run: Run) -> float:
        if run.running_since is None:
            return run.left_s
        return run.left_s - (self._now - run.running_since)

    def _stop(self, run: Run) -> None:
        """To the next safepoint, then out; what ends before that ends."""
        step_s, left = run.job.step_s, self._left(run)
        done = max(0.0, run.job.duration_s - left)
        to_go = min(left, step_s - done % step_s) if step_s else 0.0
        if to_go <= 0:
            self._moved_out(run)
        elif to_go < left:
            self._set_timer(run, to_go, "stopped")

    def _moved_out(self, run: Run) -> None:
        self._pause(run)
        run.moves += 1
        worker = run.worker_id
        self._pending.append(ev.Checkpointed(worker, "", 0))
        self._leave(worker, 0)

    def _leave(self, worker: str, status: int) -> None:
        run = self._on.pop(worker)
        self._pause(run)
        run.worker_id = ""
        self._pending.append(ev.WorkerGone(worker, status))

    # ---- timers ----

    def _set_timer(self, run: Run, in_s: float, what: str) -> None:
        self._tokens += 1
        run.token = self._tokens
        heapq.heappush(self._timers, (self._now + in_s, run.token, run, what))

    def _timer(self, run: Run, what: str) -> None:
        if what == "stopped":
            self._moved_out(run)
            self._drain()
            return
        if self._left(run) > _DONE_S:  # a resume has made it longer since
            self._set_timer(run, self._left(run), "done")
            return
        self._pause(run)
        run.left_s, run.ended_at = 0.0, self._now
        worker, pid = run.worker_id, self.core.m.workers[run.worker_id].pid
        self._do(ev.ProcessDone(worker, pid, 0, "", {}))
        self._leave(worker, 0)
        self._drain()

    # ---- sums ----

    def _add_up(self, outcome: Outcome) -> None:
        """The core's books against our own: device-seconds + idle = devices x time."""
        ours = math.fsum(r.ran_s * r.job.devices for r in outcome.runs)
        capacity = outcome.devices * outcome.makespan_s
        slack = 1e-6 * max(1.0, capacity)
        assert abs(ours - outcome.busy_s) <= slack, (ours, outcome.busy_s)
        assert outcome.busy_s <= capacity + slack, (outcome.busy_s, capacity)
        for run in outcome.runs:
            assert run.refused or run.ended_at is not None, f"{run.job} never ended"
