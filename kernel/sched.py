"""The time of one device: who has it, who is next, and when to ask again.

Three classes in strict order, a policy's `Turns` in each; a more urgent class takes the device at
once, an equal one when the turn is over. Batch keeps a small guaranteed share against interactive
work (`Reserve`). Usually one worker holds the device; two do where somebody has measured that it
helps (`may_pack`). Taking is not instant: a held worker is off the device only when the driver
says so, and until then the device belongs to it and is charged to it.

Device-seconds are accounted here: what each charge returns adds up, with the idle time, to the
uptime of the device. Knows no process, no memory and no clock: time is passed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field

from llmos.kernel.policies.base import NOBODY, Job, Policy, Turns
from llmos.kernel.policies.eevdf import Eevdf
from llmos.kernel.process import Class, weight_of
from llmos.kernel.reserve import Reserve

# A switch costs about 1 ms and a cold cache: at half a second that is noise (two trainings
# sliced 1 s / 1 s keep 0.96 of the machine), and a turn still comes soon enough to be watched.
SLICE_S: Mapping[Class, float] = {Class.INTERACTIVE: 0.1, Class.BATCH: 0.5, Class.IDLE: 0.5}

# The load shown is that of the last seconds.
LOAD_WINDOW_S = 5.0


@dataclass(slots=True)
class Lease:
    """The right of a worker to use the device."""

    worker_id: str
    cls: Class
    granted_at: float
    turn_ends_at: float
    holding: str = ""  # why it is being taken away; empty while it is not
    taken_by: int = 0  # the pid it is taken for
    leaves: str = ""  # "yielding": it will say idle by itself; "leaving": it is about to exit
    reserved_until: float = 0.0  # a turn of the guaranteed share: nobody preempts it before


@dataclass(frozen=True, slots=True)
class Charge:
    worker_id: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Decision:
    """`grant`, or `hold` with the reason: preempted, turn-ended, batch-share, apart, gang, or
    what the caller said."""

    what: str
    worker_id: str
    why: str = ""
    by: str = ""  # who the device is taken for


@dataclass(slots=True)
class _Entry:
    cls: Class
    job: Job


def request_for(step_s: float, slice_s: float) -> float:
    """The request of a worker whose steps take `step_s`: whole steps that fill a slice.

    A hold is possible anywhere in a step, so a longer step is cut at the slice. Whole steps,
    because a turn that ends between two of them finds the caches empty anyway.
    """
    if not 0 < step_s < slice_s:
        return slice_s
    return step_s * math.floor(slice_s / step_s + 1e-9)


@dataclass
class DeviceQueue:
    device: str
    started_at: float
    policy: Policy = field(default_factory=Eevdf)
    batch_share: float = 0.0
    slices: Mapping[Class, float] = field(default_factory=lambda: SLICE_S)
    leases: dict[str, Lease] = field(default_factory=dict)
    busy_s: float = 0.0
    # May these two (by worker) use the device at the same time?
    may_pack: Callable[[str, str], bool] = lambda a, b: False
    reserved_for: str = ""  # a gang that waits for its other devices
    _charged_until: float = 0.0
    _entries: dict[str, _Entry] = field(default_factory=dict)
    _lags: dict[str, float] = field(default_factory=dict)  # of workers that sleep
    _due: dict[str, float] = field(default_factory=dict)  # deadlines that cannot wait any more
    _busy_marks: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Interactive work shares by weight whatever the policy of the rest is.
        self._queues: dict[Class, Turns] = {
            c: (Eevdf(self.slices[c]) if c is Class.INTERACTIVE else self.policy).turns()
            for c in Class
        }
        self.reserve = Reserve(self.batch_share, self.slices[Class.BATCH])

    def __contains__(self, worker_id: str) -> bool:
        return worker_id in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def lease(self) -> Lease | None:
        """The lease that counts: the only one, or the older of two."""
        return next(iter(self.leases.values()), None)

    # ---- who wants the device ----

    def enqueue(self, worker_id: str, cls: Class, nice: int, job: Job | None = None) -> None:
        """A worker wants the device."""
        job = job or Job(worker_id, request_s=self.slices[cls])
        job.weight = float(weight_of(nice))
        self._entries[worker_id] = _Entry(cls, job)
        if worker_id in self.leases:
            self.leases[worker_id].leaves = ""
        self._queues[cls].add(job, self._lags.pop(worker_id, 0.0))

    def dequeue(self, worker_id: str, leaves: str = "") -> None:
        """A worker does not want the device any more; if it holds it, it is taken away.

        Not from one that `leaves` by itself: a dying worker must run to die, and an engine
        says in a moment that it is idle.
        """
        if worker_id in self.leases:
            self.leases[worker_id].leaves = leaves
        entry = self._entries.pop(worker_id, None)
        self._due.pop(worker_id, None)
        if self.reserved_for == worker_id:
            self.reserved_for = ""
        if entry is not None:
            self._lags[worker_id] = self._queues[entry.cls].remove(worker_id)

    def forget(self, worker_id: str) -> None:
        """A worker is gone for good."""
        self.dequeue(worker_id)
        self._lags.pop(worker_id, None)

    def rerank(self, worker_id: str, cls: Class, nice: int) -> None:
        """The class or the nice value changed, while it waits or runs."""
        entry = self._entries.get(worker_id)
        if entry is None:
            return
        if worker_id in self.leases:
            self.leases[worker_id].cls = cls
        weight = float(weight_of(nice))
        if entry.cls is not cls:
            # What one class owes is nothing to the other: no lag is carried over.
            self._queues[entry.cls].remove(worker_id)
            entry.job.weight, entry.job.request_s = weight, self.slices[cls]
            self._queues[cls].add(entry.job)
            entry.cls = cls
        elif entry.job.weight != weight:
            self._queues[cls].renice(worker_id, weight)

    def predict(self, worker_id: str, step_s: float) -> None:
        """The steps of a worker take `step_s` device-seconds: its next turns are whole ones."""
        entry = self._entries.get(worker_id)
        if entry is None:
            return
        request_s = request_for(step_s, self.slices[entry.cls])
        if entry.job.request_s != request_s:
            self._queues[entry.cls].request(worker_id, request_s)
        if entry.cls is Class.INTERACTIVE:
            self.reserve.gap_s = step_s

    def hurry(self, worker_id: str, due: float | None) -> None:
        """A deadline cannot wait any more: before the others of its user and class."""
        if due is None:
            self._due.pop(worker_id, None)
        elif worker_id in self._entries:
            self._due[worker_id] = due

    def may_run(self, worker_id: str) -> bool:
        """Whether nothing here speaks against the turn of a gang: no more urgent class, no debt."""
        entry = self._entries.get(worker_id)
        if entry is None:
            return False
        share = self.reserve.pending and entry.cls is Class.BATCH
        if not share and any(len(self._queues[c]) for c in Class if c < entry.cls):
            return False
        return self._queues[entry.cls].may_run(worker_id)

    # ---- where the seconds go ----

    def charge(self, now: float) -> list[Charge]:
        """Account the time since the last charge to who holds the device; two share it."""
        seconds = now - self._charged_until
        if seconds <= 0:
            return []
        self._charged_until = now
        if not self.leases:
            return []
        self.busy_s += seconds
        each = seconds / len(self.leases)
        for worker_id, lease in self.leases.items():
            entry = self._entries.get(worker_id)
            if entry is not None:
                self._queues[entry.cls].charge(worker_id, each)
            self.reserve.account(lease.cls, each, bool(len(self._queues[Class.BATCH])))
        return [Charge(worker_id, each) for worker_id in self.leases]

    def released(self, worker_id: str) -> None:
        """The driver says the worker is off the device (held, idle or gone)."""
        self.leases.pop(worker_id, None)

    def load(self, now: float) -> float:
        """The busy part of the last seconds, 0 to 1. Called about once a second."""
        self._busy_marks = [m for m in self._busy_marks if m[0] > now - LOAD_WINDOW_S]
        self._busy_marks.append((now, self.busy_s))
        since, busy = self._busy_marks[0]
        return min(1.0, (self.busy_s - busy) / (now - since)) if now > since else 0.0

    def busy_until(self, now: float) -> float:
        """Busy seconds, with those that have not been charged yet."""
        return self.busy_s + (now - self._charged_until if self.leases else 0.0)

    # ---- decisions ----

    def decide(self, now: float, skip: Container[str] = NOBODY) -> list[Decision]:
        """What to do now, if anything; `charge` first. Who is in `skip` cannot be granted now."""
        best = self.best(skip)
        if not self.leases:
            return [self._grant(best, now)] if best is not None else []
        if any(lease.holding for lease in self.leases.values()):
            return []
        taken = [d for lease in self.leases.values() if (d := self._take(lease, best, now))]
        if taken:
            return taken
        if len(self.leases) > 1:
            a, b = self.leases
            return [] if self.may_pack(a, b) else [self.hold(b, "apart")]
        return self._beside(best, now, skip)

    def hold(self, worker_id: str, why: str, by: str = "") -> Decision:
        """Begin to take the device from a worker that holds it."""
        lease = self.leases[worker_id]
        lease.holding = why
        return Decision("hold", worker_id, why, by)

    def lend(self, worker_id: str, now: float) -> Lease:
        """Enter a lease, whoever decided it."""
        entry = self._entries[worker_id]
        queue = self._queues[entry.cls]
        self._charged_until = max(now, self._charged_until)
        lease = Lease(worker_id, entry.cls, now, now + queue.left_s(worker_id))
        if entry.cls is Class.BATCH and (turn_s := self.reserve.begin()):
            lease.reserved_until = now + turn_s
            lease.turn_ends_at = max(lease.turn_ends_at, lease.reserved_until)
        self.leases[worker_id] = lease
        if self.reserved_for == worker_id:
            self.reserved_for = ""
        return lease

    def best(self, skip: Container[str] = NOBODY) -> str | None:
        """Who should have the device next."""
        if not len(self._queues[Class.BATCH]):
            self.reserve.pending = False  # it was for somebody who has gone
        if self.reserve.pending:
            order = (Class.BATCH, Class.INTERACTIVE, Class.IDLE)
        else:
            order = (Class.INTERACTIVE, Class.BATCH, Class.IDLE)
        for cls in order:
            if len(self._queues[cls]):
                found = self._queues[cls].pick(skip)
                if found is not None:
                    return self._urgent(found, cls, skip)
        return None

    def wake_at(self) -> float | None:
        """When `decide` may answer differently though no event comes."""
        found = [at for lease in self.leases.values() if (at := self._wake_for(lease)) is not None]
        return min(found, default=None)

    def waiting_before(self, worker_id: str) -> int:
        """How many workers of the same or a more urgent class want the device too."""
        entry = self._entries.get(worker_id)
        if entry is None:
            return 0
        return sum(len(self._queues[c]) for c in Class if c <= entry.cls) - 1

    def check(self) -> None:
        """The invariants, for tests."""
        for cls in Class:
            mine = [w for w, e in self._entries.items() if e.cls is cls]
            assert len(self._queues[cls]) == len(mine)
            self._queues[cls].check()
        assert len(self.leases) <= 2, f"{self.device}: {list(self.leases)}"

    def _urgent(self, found: str, cls: Class, skip: Container[str]) -> str:
        """A deadline counts among the processes of one user only: it takes nothing of others."""
        if not self._due:
            return found
        user = self._entries[found].job.user
        mine = [
            (due, worker_id)
            for worker_id, due in self._due.items()
            if worker_id not in skip
            and self._entries[worker_id].cls is cls
            and self._entries[worker_id].job.user == user
        ]
        return min(mine)[1] if mine else found

    def _take(self, lease: Lease, best: str | None, now: float) -> Decision | None:
        """Whether a lease is to end now."""
        entry = self._entries.get(lease.worker_id)
        over = now >= lease.turn_ends_at
        if entry is None:
            stays = lease.leaves == "leaving" or (lease.leaves and not (over and best is not None))
            return None if stays else self.hold(lease.worker_id, "given up")
        if best is None or best in self.leases:
            if over:
                lease.turn_ends_at = now + self._queues[entry.cls].left_s(lease.worker_id)
            return self._share_of_batch(lease, now)
        if self._entries[best].cls < entry.cls:
            reserved = now < lease.reserved_until
            return None if reserved else self.hold(lease.worker_id, "preempted", best)
        if over:
            return self.hold(lease.worker_id, "turn-ended", best)
        same = self._entries[best].job.user == entry.job.user
        if best in self._due and lease.worker_id not in self._due and same:
            return self.hold(lease.worker_id, "deadline", best)
        return self._share_of_batch(lease, now)

    def _share_of_batch(self, lease: Lease, now: float) -> Decision | None:
        """Interactive work gives way for one turn when batch has gone short for too long."""
        batch = self._queues[Class.BATCH]
        if lease.cls is not Class.INTERACTIVE or not len(batch) or not self.reserve.due():
            return None
        self.reserve.pending = True
        return self.hold(lease.worker_id, "batch-share", batch.pick() or "")

    def _beside(self, best: str | None, now: float, skip: Container[str]) -> list[Decision]:
        """A second worker beside the one that has the device, where that is known to help."""
        lease = self.lease
        assert lease is not None
        entry = self._entries.get(lease.worker_id)
        if entry is None or lease.cls is Class.INTERACTIVE or self.reserved_for:
            return []
        if best in self.leases:
            best = self._queues[entry.cls].pick(_Both(self.leases, skip))
        if best is None or self._entries[best].cls is Class.INTERACTIVE:
            return []
        if not self.may_pack(lease.worker_id, best):
            return []
        return [self._grant(best, now)]

    def _wake_for(self, lease: Lease) -> float | None:
        if lease.holding or lease.leaves == "leaving":
            return None
        if not any(w not in self.leases for w in self._entries):
            return None
        times = [lease.turn_ends_at]
        if lease.reserved_until > self._charged_until:
            times.append(lease.reserved_until)
        wants = lease.worker_id in self._entries
        if wants and lease.cls is Class.INTERACTIVE and len(self._queues[Class.BATCH]):
            in_s = self.reserve.due_in_s()
            if in_s is not None:
                times.append(self._charged_until + in_s)
        return min(times) if math.isfinite(min(times)) else None

    def _grant(self, worker_id: str, now: float) -> Decision:
        self.lend(worker_id, now)
        return Decision("grant", worker_id)


@dataclass(frozen=True, slots=True)
class _Both:
    """Two containers as one."""

    one: Container[str]
    other: Container[str]

    def __contains__(self, key: object) -> bool:
        return key in self.one or key in self.other
