"""Spin: a load of known size for tests and benchmarks. It knows no model and no data."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmos.services.programs.base import (
    COPY,
    Context,
    Done,
    Footprint,
    Keep,
    Program,
    Report,
    Segment,
    arg,
    as_it_is,
    keep,
    save_every,
)

if TYPE_CHECKING:
    from torch import Tensor

# What a process of this program holds beside its ballast: a few small matrices and the
# allocator's own pages. Measured as private memory above an idle worker.
SMALL_BYTES = 4 * 2**20


class Spin(Program):
    name = "spin"
    summary = "Multiply matrices: a load for tests and benchmarks"
    examples = ("llmos spin --steps 100 --busy-ms 20", "llmos spin --memory-bytes 1000000000")
    group = "system"
    hidden = True
    has_checkpoint = True

    @dataclass(frozen=True)
    class Args:
        steps: int = arg(10, help="how many steps to run; 0 runs until it is killed", minimum=0)
        busy_ms: float = arg(
            5.0, help="CPU time of the main thread in each step", minimum=0, shape=False
        )
        memory_bytes: int = arg(0, help="memory to hold and to touch", minimum=0)
        grow_bytes: int = arg(0, help="memory to take more in each step", minimum=0)
        size: int = arg(128, help="rows and columns of the matrices", minimum=1, maximum=8192)
        seed: int = arg(0, help="of the matrices", shape=False)
        fail_at: int = arg(-1, help="raise an error in this step (the first is 1)", shape=False)
        exit_status: int = arg(
            0, help="exit status after the last step", minimum=0, maximum=255, shape=False
        )
        save_every: str = save_every()
        keep: int = keep()

    @classmethod
    def plan(cls, args: Any) -> Footprint:
        matrices = 4 * 4 * args.size**2
        held = args.memory_bytes + matrices + SMALL_BYTES
        return Footprint((Segment("activations", held), Segment(COPY, 4 * args.size**2)))

    def load(self, ctx: Context) -> None:
        import torch

        torch.set_num_threads(ctx.threads)
        self._ctx, self._gate = ctx, ctx.gate
        generator = torch.Generator().manual_seed(self.args.seed)
        size = self.args.size
        self._steps_done = 0
        # Drawn on the CPU: the same matrices on every device.
        turn = torch.randn(size, size, generator=generator) / size**0.5
        self._turn = turn.to(ctx.device)
        self._state = torch.randn(size, size, generator=generator).to(ctx.device)
        self._scratch = torch.empty(size, size, device=ctx.device)
        # Written, not only reserved: untouched pages cost no memory.
        ballast = self.args.memory_bytes
        self._ballast = [torch.full((ballast,), 1, dtype=torch.uint8, device=ctx.device)]

    def step(self, ctx: Context) -> Report | Done:
        import torch

        args = self.args
        if args.steps and self._steps_done >= args.steps:
            checksum = float(self._state.double().sum())
            return Done(args.exit_status, result={"steps": self._steps_done, "checksum": checksum})
        if self._steps_done + 1 == args.fail_at:
            raise RuntimeError(f"spin was told to fail at step {args.fail_at}")
        if args.grow_bytes:
            self._ballast.append(
                torch.full((args.grow_bytes,), 1, dtype=torch.uint8, device=ctx.device)
            )
        with torch.inference_mode():
            self._state = self._advance(self._state)
            self._burn(args.busy_ms / 1000)
            checksum = float(self._state.double().sum())
        self._steps_done += 1
        return Report(self._steps_done, args.steps or None, {"checksum": checksum})

    def _advance(self, state: Tensor) -> Tensor:
        """The same update in each step, so that a continued run can be compared bit for bit."""
        if self.args.busy_ms == 0:
            return state * 0.999
        turned: Tensor = (self._turn @ state).tanh()
        return turned

    def _burn(self, busy_s: float) -> None:
        import torch

        # On a GPU the thread that queues work sleeps while the queue is full: wall time then.
        now_s = time.monotonic if self._gate.active else time.thread_time
        end_s = now_s() + busy_s
        while now_s() < end_s:
            self._gate.boundary("product")
            torch.mm(self._turn, self._state, out=self._scratch)

    def tensors(self) -> Iterable[Tensor]:
        return self._turn, self._state, self._scratch, *self._ballast

    def save(self, folder: Path) -> None:
        self.capture(as_it_is)(folder)

    def capture(self, keep: Keep) -> Callable[[Path], None]:
        from safetensors.torch import save_file

        from llmos.services.programs import conditions

        state = {"state": keep(self._state)}
        here = conditions.now(self._turn.device, "float32")
        text = json.dumps({"steps_done": self._steps_done, "conditions": here})

        def write(folder: Path) -> None:
            save_file(state, folder / "state.safetensors")
            (folder / "spin.json").write_text(text)

        return write

    def restore(self, folder: Path) -> None:
        from safetensors.torch import load_file

        from llmos.services.programs import conditions

        # Cloned: a mapped file is not aligned, and kernels choose their path by alignment.
        self._state = load_file(folder / "state.safetensors")["state"].to(
            self._turn.device, copy=True
        )
        saved = json.loads((folder / "spin.json").read_text())
        self._steps_done = saved["steps_done"]
        before = saved.get("conditions", {})
        here = conditions.now(self._turn.device, "float32")
        if text := conditions.differences(before, here):
            self._ctx.emit("note", text=text)
