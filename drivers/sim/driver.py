"""The simulated driver: devices, workers and guests that exist only as timers.

It keeps the whole contract (messages, holds in the middle of a step, checkpoints on disk, exit
statuses), so the kernel can be tested against machines that nobody has. A device is written
sim0[:memory=8GiB,lanes=2]. What a worker does follows from its arguments, whatever its program:

    steps, busy_ms      that many steps of that length          (default 10 of 5 ms)
    memory_bytes        what it uses once it is loaded      grow_bytes    and more after each step
    may_shrink          a `shrink` of its batch halves what it uses then
    fail_at             the step at which it raises             exit_status   what it ends with
    max_tokens          as a guest: the tokens it wants, one a step; `turns`: then it waits for
                        input instead of ending
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmos.drivers.base import (
    DeviceInfo,
    MemorySample,
    PlanMade,
    Tell,
    WorkerCame,
    WorkerEnded,
    WorkerHeld,
    WorkerSaid,
    WorkerSpec,
)
from llmos.drivers.worker import checkpoint
from llmos.drivers.worker.stream import Stream
from llmos.kernel.errors import BadArgument, BadInput, OutOfMemory
from llmos.kernel.units import parse_bytes

START_S, LOAD_S, HOLD_S, EXIT_S = 0.002, 0.002, 0.0005, 0.001
DEFAULT_MEMORY = 8 * 1024**3


@dataclass(slots=True)
class _Guest:
    rank: tuple[int, int, int]
    wants: int
    stream: Stream
    parked: bool = False
    turns: bool = False
    made: int = 0
    served_at: int = 0


@dataclass(slots=True)
class _Worker:
    spec: WorkerSpec
    os_pid: int
    pid: int = 0
    args: dict[str, Any] = field(default_factory=dict)
    work: Path = Path()
    loaded: bool = False
    leased: bool = False
    engine: bool = False
    step: int = 0
    left_s: float = 0.0  # of the step that a hold interrupted
    began: float = 0.0
    timer: asyncio.TimerHandle | None = None
    stream: Stream | None = None
    guests: dict[int, _Guest] = field(default_factory=dict)
    seen: int = 0
    floor: int = 2
    want_checkpoint: bool = False
    want_stop: bool = False
    inbox: list[dict[str, Any]] = field(default_factory=list)
    over: bool = False
    limit: int | None = None
    freed: int = 0

    @property
    def memory_bytes(self) -> int:
        """What it uses now."""
        grown = self.step * int(self.args.get("grow_bytes", 0))
        return int(self.args.get("memory_bytes", 0)) + grown - self.freed


class SimDriver:
    kind = "sim"

    def __init__(self, specs: list[str]) -> None:
        found = [_parse(spec) for spec in specs or ["sim0"]]
        self._found = {d.name: d for d in found}
        if len(self._found) < len(found):
            raise BadArgument("two devices have the same name", "name them sim0, sim1, ...")
        self._workers: dict[str, _Worker] = {}
        self._pids = itertools.count(1_000_000)  # no OS process: only a name
        self._seq = itertools.count(1)
        self._turn = itertools.count(1)

    def devices(self) -> Sequence[DeviceInfo]:
        return list(self._found.values())

    async def open(self, tell: Tell, home: Path, home_id: str) -> None:
        self._tell = tell
        self._loop = asyncio.get_running_loop()

    async def close(self) -> None:
        for worker in list(self._workers.values()):
            self._forget(worker)

    def plan(
        self, ticket: int, entry: str, args: dict[str, Any], user: Mapping[str, Any] | None = None
    ) -> None:
        nbytes = int(args.get("memory_bytes", 0))
        answer = PlanMade(ticket, [{"kind": "activations", "bytes": nbytes, "shared": ""}])
        if nbytes < 0:
            error = BadInput(f"memory_bytes is {nbytes}", "give 0 or more").to_wire()
            answer = PlanMade(ticket, None, error)
        self._loop.call_soon(self._tell, answer)

    def start(self, spec: WorkerSpec) -> None:
        worker = _Worker(spec, next(self._pids))
        self._workers[spec.worker_id] = worker
        hello = {"k": "hello", "worker_id": spec.worker_id, "os_pid": worker.os_pid,
                 "loaded": False, "step": 0, "guests": []}  # fmt: skip
        came = WorkerCame(spec.worker_id, worker.os_pid, hello)
        self._after(worker, START_S, lambda: self._tell(came))

    def adopt(self, spec: WorkerSpec, os_pid: int, started: float) -> None:
        # Timers die with their process: nothing can outlive a kernel here.
        self._loop.call_soon(self._tell, WorkerEnded(spec.worker_id, None))

    def started(self, os_pid: int) -> float:
        return float(os_pid)

    def send(self, worker_id: str, message: dict[str, Any]) -> None:
        worker = self._workers.get(worker_id)
        if worker is None or worker.over:
            return
        worker.inbox.append(message)
        # As in a real worker: read between steps, and not while held.
        if message["k"] == "load" or (worker.leased and worker.timer is None):
            self._read(worker)

    def grant(self, worker_id: str, floor: int) -> None:
        worker = self._workers.get(worker_id)
        if worker is None or worker.over:
            return
        worker.leased, worker.floor = True, floor
        if worker.timer is None:
            self._read(worker)

    def hold(self, worker_id: str) -> None:
        worker = self._workers.get(worker_id)
        if worker is None or worker.over:
            return
        worker.leased = False
        if worker.timer is not None and worker.began:
            worker.left_s -= self._loop.time() - worker.began
            worker.timer.cancel()
            worker.timer, worker.began = None, 0.0
        self._loop.call_later(HOLD_S, self._held, worker)

    def signal(self, worker_id: str, signal: int) -> None:
        worker = self._workers.get(worker_id)
        if worker is not None and not worker.over:
            self._end(worker, 128 + signal)

    def limit(self, worker_id: str, nbytes: int) -> None:
        worker = self._workers.get(worker_id)
        if worker is not None and not worker.over:
            worker.limit = nbytes

    async def measure(self, device: str, system_pids: Sequence[int]) -> MemorySample:
        used = {
            w.spec.worker_id: w.memory_bytes
            for w in self._workers.values()
            if w.spec.device == device and w.loaded
        }
        capacity = self._found[device].capacity_bytes
        return MemorySample(capacity, capacity - sum(used.values()), 0, 0, used)

    def statistics(self) -> dict[str, Any]:
        return {"state": "simulated", "os_pid": None}

    # ---- the life of a worker ----

    def _after(self, worker: _Worker, delay_s: float, what: Callable[[], None]) -> None:
        def run() -> None:
            if not worker.over:
                what()

        self._loop.call_later(delay_s, run)

    def _held(self, worker: _Worker) -> None:
        if not worker.over and not worker.leased:
            self._tell(WorkerHeld(worker.spec.worker_id))

    def _say(self, worker: _Worker, message: dict[str, Any], keep: bool = False) -> None:
        if keep:
            message = {**message, "seq": next(self._seq)}
        self._tell(WorkerSaid(worker.spec.worker_id, message))

    def _read(self, worker: _Worker) -> None:
        """Handle all messages, then begin or go on with a step."""
        while worker.inbox and not worker.over:
            self._take(worker, worker.inbox.pop(0))
        if worker.leased and worker.loaded and worker.timer is None and not worker.over:
            self._work(worker)

    def _take(self, worker: _Worker, m: dict[str, Any]) -> None:
        match m["k"]:
            case "load":
                self._load(worker, m)
            case "admit":
                worker.seen += 1
                wants = int(m["args"].get("max_tokens", 1))
                stream = Stream(Path(m["work"]) / "stream")
                worker.guests[m["pid"]] = _Guest(
                    tuple(m["rank"]), wants, stream, m["parked"], bool(m["args"].get("turns"))
                )
            case "drop":
                worker.seen += 1
                dropped = worker.guests.pop(m["pid"], None)
                if dropped is not None:
                    dropped.stream.close()
            case "input":
                worker.seen += 1
                guest = worker.guests.get(m["pid"])
                if guest is not None:
                    guest.made = 0
            case "rank" if m["pid"] in worker.guests:
                guest = worker.guests[m["pid"]]
                guest.rank, guest.parked = tuple(m["rank"]), m["parked"]
            case "checkpoint":
                worker.want_checkpoint = True
            case "shrink":
                shrank = m["level"] == "caches" or bool(worker.args.get("may_shrink"))
                freed = worker.memory_bytes // 2 if m["level"] == "batch" and shrank else 0
                worker.freed += freed
                said = {"level": m["level"], "shrank": shrank, "freed_bytes": freed}
                self._say(worker, {"k": "shrunk", **said}, keep=True)
            case "stop":
                worker.want_stop = True
                if worker.step and not worker.left_s:
                    self._checkpoint(worker)
                    self._end(worker, 0)

    def _load(self, worker: _Worker, m: dict[str, Any]) -> None:
        worker.pid, worker.args, worker.work = m["pid"], m["args"], Path(m["work"])
        worker.stream = Stream(worker.work / "stream")
        worker.engine = "keep_alive_s" in m["args"] or "engine" in str(m.get("program"))
        folder = checkpoint.newest(worker.work / "checkpoints", lambda _: None)
        if folder is not None:
            worker.step = int(json.loads((folder / "state.json").read_text())["step"])

        def ready() -> None:
            worker.loaded = True
            self._say(worker, {"k": "loaded"}, keep=True)
            self._read(worker)

        self._after(worker, LOAD_S, ready)

    def _runnable(self, worker: _Worker) -> list[tuple[int, _Guest]]:
        found = [
            (pid, g)
            for pid, g in worker.guests.items()
            if not g.parked and g.made < g.wants and g.rank[0] <= worker.floor
        ]
        return sorted(found, key=lambda f: (f[1].rank[:2], f[1].served_at))

    def _work(self, worker: _Worker) -> None:
        if worker.engine and not self._runnable(worker):
            self._say(worker, {"k": "idle", "seen": worker.seen})
            return
        if not worker.left_s:
            worker.left_s = float(worker.args.get("busy_ms", 5.0)) / 1000
        worker.began = self._loop.time()
        worker.timer = self._loop.call_later(worker.left_s, self._step_done, worker)

    def _step_done(self, worker: _Worker) -> None:
        worker.timer, worker.left_s, worker.began = None, 0.0, 0.0
        if worker.over:
            return
        worker.step += 1
        if worker.step == int(worker.args.get("fail_at", -1)):
            self._done(worker, 1, "RuntimeError: told to fail")
            return
        if self._hit_the_wall(worker):
            return
        if worker.engine:
            self._token(worker)
        else:
            self._report(worker)
        if not worker.over:
            self._read(worker)

    def _hit_the_wall(self, worker: _Worker) -> bool:
        """Has it just grown beyond its limit? Then that was its end."""
        if worker.limit is None or worker.memory_bytes <= worker.limit:
            return False
        wanted = int(worker.args.get("grow_bytes", 0))
        had = worker.memory_bytes - wanted
        error = OutOfMemory(f"it had {had} bytes and asked for {wanted} more").to_wire()
        memory = {"peak_bytes": had, "promised_bytes": worker.limit, "wanted_bytes": wanted}
        self._done(worker, 1, error["message"], {"error": error, "memory": memory})
        return True

    def _token(self, worker: _Worker) -> None:
        runnable = self._runnable(worker)
        shares = {}
        if runnable:
            pid, guest = runnable[0]
            guest.made += 1
            guest.served_at = next(self._turn)
            guest.stream.append("text", {"text": f"{guest.made} ", "tokens": [guest.made]})
            shares = {pid: 1.0}
        self._say(
            worker,
            {"k": "report", "step": worker.step, "total": None, "metrics": {}, "shares": shares,
             "marks": list(shares)},
        )  # fmt: skip
        for pid in shares:
            self._guest_after_token(worker, pid)

    def _guest_after_token(self, worker: _Worker, pid: int) -> None:
        guest = worker.guests[pid]
        if guest.made < guest.wants:
            return
        if guest.turns:
            self._say(worker, {"k": "guest_idle", "pid": pid, "seen": worker.seen}, keep=True)
            return
        guest.stream.close()
        del worker.guests[pid]
        done = {"status": 0, "reason": "", "result": {"tokens": guest.made}}
        self._say(worker, {"k": "guest_done", "pid": pid, **done}, keep=True)

    def _report(self, worker: _Worker) -> None:
        total = int(worker.args.get("steps", 10))
        progress = {"step": worker.step, "total": total, "metrics": {}}
        assert worker.stream is not None
        worker.stream.append("progress", progress)
        self._say(worker, {"k": "report", **progress, "shares": {}, "marks": [worker.pid]})
        if worker.want_checkpoint or worker.want_stop:
            self._checkpoint(worker)
        if worker.want_stop:
            self._end(worker, 0)
        elif total and worker.step >= total:
            self._done(worker, int(worker.args.get("exit_status", 0)), "")

    def _checkpoint(self, worker: _Worker) -> None:
        worker.want_checkpoint = False

        def fill(folder: Path) -> None:
            (folder / "state.json").write_text(json.dumps({"step": worker.step}))

        folder = checkpoint.write(worker.work / "checkpoints", worker.step, fill)
        said = {"k": "checkpointed", "folder": str(folder), "step": worker.step}
        self._say(worker, said, keep=True)

    def _done(
        self, worker: _Worker, status: int, reason: str, result: dict[str, Any] | None = None
    ) -> None:
        result = {"steps": worker.step} if result is None else result
        end = {"status": status, "reason": reason, "result": result}
        self._say(worker, {"k": "done", **end}, keep=True)
        self._end(worker, status)

    def _end(self, worker: _Worker, status: int) -> None:
        self._forget(worker)
        ended = WorkerEnded(worker.spec.worker_id, status)
        self._loop.call_later(EXIT_S, self._tell, ended)

    def _forget(self, worker: _Worker) -> None:
        worker.over = True
        if worker.timer is not None:
            worker.timer.cancel()
        for stream in [g.stream for g in worker.guests.values()]:
            stream.close()
        if worker.stream is not None:
            worker.stream.close()
        self._workers.pop(worker.spec.worker_id, None)


def _parse(spec: str) -> DeviceInfo:
    name, _, rest = spec.partition(":")
    capacity, lanes = DEFAULT_MEMORY, 1
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if key == "memory" and equals:
            capacity = parse_bytes(value)
        elif key == "lanes" and value.isdigit() and int(value) > 0:
            lanes = int(value)
        else:
            raise BadArgument(f"{spec}: {item!r} is not known", "write memory=8GiB or lanes=2")
    if capacity <= 0:
        raise BadArgument(f"{spec}: {name} has no memory", "write memory=8GiB")
    return DeviceInfo(name, "sim", capacity, lanes, "cpu", "simulated, nothing is computed")
