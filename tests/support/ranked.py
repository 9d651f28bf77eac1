"""Programs for tests of gangs: ranks that fail on demand, and ranks that wait for each other."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import ClassVar

import torch
import torch.distributed as dist

from llmos.kernel.errors import BadInput
from llmos.services.programs.base import Context, Done, Program, Report, arg


class Failing(Program):
    """At its third step one rank, or all of them, fails in the way that is asked for."""

    name: ClassVar[str] = "failing"
    summary: ClassVar[str] = "A gang one of whose ranks fails"

    @dataclass(frozen=True)
    class Args:
        rank: int = arg(1, help="which rank fails (-1: each)")
        how: str = arg("input", help="input, memory or bug")
        devices: int = arg(2, help="ranks")

    def load(self, ctx: Context) -> None:
        self.at = 0

    def step(self, ctx: Context) -> Report | Done:
        self.at += 1
        if self.at == 3 and self.args.rank in (ctx.rank, -1):
            if self.args.how == "input":
                raise BadInput("the third example is bad", "take another one")
            if self.args.how == "memory":
                raise MemoryError
            raise ValueError(f"a bug in rank {ctx.rank}")
        dist.barrier()  # who is late is waited for
        return Report(self.at)


class Waiting(Program):
    """Ranks that meet at each step. Collectives fail after `limit_s` (0: as llmos has it)."""

    name: ClassVar[str] = "waiting"
    summary: ClassVar[str] = "A gang whose ranks wait for each other"

    @dataclass(frozen=True)
    class Args:
        steps: int = arg(1000, help="steps")
        limit_s: float = arg(0.0, help="limit of a collective")
        devices: int = arg(2, help="ranks")

    def load(self, ctx: Context) -> None:
        self.at = 0
        limit = timedelta(seconds=self.args.limit_s)
        self.group = dist.new_group(timeout=limit) if self.args.limit_s else dist.group.WORLD

    def step(self, ctx: Context) -> Report | Done:
        if self.at == self.args.steps:
            return Done()
        self.at += 1
        met = torch.ones(())
        dist.all_reduce(met, group=self.group)
        return Report(self.at, self.args.steps, {"met": met.item()})
