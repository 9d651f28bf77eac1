"""Engine: one language model in memory, and the guests (infer, chat) that it serves.

Here are only its schema and its plan; the work is done in `services.engine`, which loads torch.
Loading and unloading an engine are the kernel's decisions, and so is how long it is kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmos.kernel.units import parse_bytes
from llmos.services.programs.base import Context, Footprint, Guest, Idle, Program, Report, arg

if TYPE_CHECKING:
    from torch import Tensor

    from llmos.services.engine.host import Host


class Engine(Program):
    name = "engine"
    summary = "Hold a language model in memory and serve its guests"
    group = "system"
    default_class = "interactive"
    hidden = True
    on_interrupt = "kill"
    ends_in_order = True  # what chats have computed is kept for the next engine

    preload = (
        "llmos.services.engine.host",
        "llmos.services.engine.plan",
    )

    @dataclass(frozen=True)
    class Args:
        model: str = arg(help="registry name, folder or hub name", positional=True, model=True)
        dtype: str = arg(
            "auto",
            help="number format of the weights",
            choices=("auto", "float32", "bfloat16", "int8"),
        )
        threads: int = arg(0, help="CPU threads; 0: as many as the kernel gives", minimum=0)
        keep_alive_s: float = arg(
            300.0,
            help="keep the model loaded so long after its last use; -1: for ever",
            minimum=-1,
            shape=False,
            duration=True,
        )
        trust_remote_code: bool = arg(
            False, help="run code that lies in the model's folder, for this run"
        )

        kv_memory: str = arg(
            "", help="memory for keys and values, such as 2GiB; default: 16,384 tokens at least"
        )

    _host: Host

    @classmethod
    def plan(cls, args: Any) -> Footprint:
        from llmos.services.engine.plan import plan_engine
        from llmos.services.model.load import allow_code

        allow_code(args.trust_remote_code)
        return plan_engine(args.model, args.dtype, _kv_bytes(args.kv_memory))

    def load(self, ctx: Context) -> None:
        from llmos.services.engine.host import Host
        from llmos.services.model.load import allow_code

        allow_code(self.args.trust_remote_code)
        threads = self.args.threads or ctx.threads
        kv_bytes = _kv_bytes(self.args.kv_memory)
        args = self.args
        self._host = Host(
            args.model, args.dtype, ctx.device, threads, ctx.gate, kv_bytes, ctx.home
        )  # fmt: skip

    def step(self, ctx: Context) -> Report | Idle:
        return self._host.step(ctx)

    def close(self) -> None:
        if hasattr(self, "_host"):
            self._host.close()

    def tensors(self) -> Iterable[Tensor]:
        return self._host.tensors()

    def admit(self, ctx: Context, guest: Guest) -> None:
        self._host.admit(ctx, guest)

    def drop(self, ctx: Context, pid: int) -> None:
        self._host.drop(pid)

    def rank(self, ctx: Context, pid: int, rank: tuple[int, int, int], parked: bool) -> None:
        self._host.rank(pid, rank, parked)

    def message(self, ctx: Context, pid: int, message: dict[str, Any]) -> None:
        self._host.message(ctx, pid, message)

    def shrink(self, ctx: Context, level: str) -> bool:
        if level == "caches":
            self._host.trim()
        return level == "caches"

    def floor(self, class_rank: int) -> None:
        self._host.floor = class_rank


def _kv_bytes(text: str) -> int:
    """Bytes of `--kv-memory`; 0: as many as are planned by default. Raises BadArgument."""
    return parse_bytes(text) if text else 0
