"""Run a program in this process, without a kernel: load, step, save, restore.

What it does not know: workers, leases, the books. It calls a program's methods in the order
in which a worker does, and keeps what the program emits in plain lists.
"""

from __future__ import annotations

import importlib.metadata
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmos.drivers.worker.gate import Gate
from llmos.services.base import Service, invoke
from llmos.services.programs.base import Done, Guest, Idle, Program, Report


@dataclass
class FakeContext:
    """The worker's side of the contract. `calls` go to real services in this process."""

    home: Path
    pid: int = 100
    device: str = "cpu"
    threads: int = 2
    rank: int = 0
    ranks: int = 1
    records: list[dict[str, Any]] = field(default_factory=list)
    guests_done: dict[int, Done] = field(default_factory=dict)
    guests_idle: list[int] = field(default_factory=list)
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    gate: Gate = field(default_factory=lambda: Gate(lambda message: None))
    _services: dict[str, Service] = field(default_factory=dict)

    @property
    def work(self) -> Path:
        folder = self.home / "work" / str(self.pid)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def clock(self) -> float:
        return time.monotonic()  # nobody holds it here

    def emit(self, kind: str, pid: int | None = None, **values: Any) -> None:
        self.records.append({"kind": kind, "pid": self.pid if pid is None else pid, **values})

    def guest_done(self, pid: int, done: Done) -> None:
        self.guests_done[pid] = done

    def guest_idle(self, pid: int) -> None:
        self.guests_idle.append(pid)

    def call(self, method: str, /, **arguments: Any) -> Any:
        self.calls.append((method, arguments))
        service, _, name = method.partition(".")
        if service not in self._services:
            (entry,) = importlib.metadata.entry_points(group="llmos.services", name=service)
            self._services[service] = entry.load()(self.home)
        return invoke(self._services[service], name, arguments)

    def of_kind(self, kind: str, pid: int | None = None) -> list[dict[str, Any]]:
        """The emitted records of one kind (of one guest, where `pid` is given)."""
        return [r for r in self.records if r["kind"] == kind and pid in (None, r["pid"])]

    def text(self, pid: int | None = None) -> str:
        """All emitted text, joined."""
        return "".join(str(r["text"]) for r in self.of_kind("text", pid))


def make_context(tmp_path: Path, **values: Any) -> FakeContext:
    """A context whose home is `tmp_path`/home."""
    home = tmp_path / "home"
    (home / "models").mkdir(parents=True, exist_ok=True)
    return FakeContext(home=home, **values)


@dataclass
class Run:
    """One loaded program. `reports` and `done` are what its steps returned."""

    program: Program
    ctx: FakeContext
    reports: list[Report] = field(default_factory=list)
    done: Done | None = None

    @classmethod
    def start(cls, program: type[Program], ctx: FakeContext, **args: Any) -> Run:
        """Build the program with `args` and load it."""
        made = program(program.Args(**args))
        made.load(ctx)
        return cls(made, ctx)

    @classmethod
    def resume(cls, program: type[Program], ctx: FakeContext, folder: Path, **args: Any) -> Run:
        """A new instance that goes on from the checkpoint in `folder`."""
        run = cls.start(program, ctx, **args)
        run.program.restore(folder)
        return run

    def step(self) -> Report | Done | Idle:
        out = self.program.step(self.ctx)
        if isinstance(out, Report):
            self.reports.append(out)
        elif isinstance(out, Done):
            self.done = out
        return out

    def steps(self, count: int) -> Run:
        """`count` calls of `step`; fails when the program ends before."""
        for _ in range(count):
            assert not isinstance(self.step(), Done), f"ended early: {self.done}"
        return self

    def to_end(self, most: int = 100_000) -> Done:
        """Steps until the program is done."""
        for _ in range(most):
            out = self.step()
            if isinstance(out, Done):
                return out
        raise AssertionError(f"not done after {most} steps")

    def until_idle(self, most: int = 100_000) -> Run:
        """Steps of an engine until it has nothing to do."""
        for _ in range(most):
            if isinstance(self.step(), Idle):
                return self
        raise AssertionError(f"not idle after {most} steps")

    def save(self, folder: Path) -> Path:
        """A checkpoint in a new, empty `folder`."""
        os.makedirs(folder)
        self.program.save(folder)
        return folder


def admit(
    run: Run, pid: int, program: str, rank: tuple[int, int, int] = (0, 0, 0), **args: Any
) -> Guest:
    """Bring a guest to an engine."""
    guest = Guest(pid=pid, program=program, args=args, rank=rank)
    run.program.admit(run.ctx, guest)
    return guest
