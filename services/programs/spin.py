"""Spin: a load of known size for tests and benchmarks. It knows no model and no data."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmos.services.programs.base import Context, Done, Footprint, Program, Report, Segment, arg

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
        busy_ms: float = arg(5.0, help="CPU time of the main thread in each step", minimum=0)
        memory_bytes: int = arg(0, help="memory to hold and to touch", minimum=0)
        size: int = arg(128, help="rows and columns of the matrices", minimum=1, maximum=8192)
        seed: int = arg(0, help="of the matrices")
        fail_at: int = arg(-1, help="raise an error in this step (the first is 1)")
        exit_status: int = arg(0, help="exit status after the last step", minimum=0, maximum=255)

    @classmethod
    def plan(cls, args: Any) -> Footprint:
        matrices = 4 * 4 * args.size**2
        held = args.memory_bytes + matrices + SMALL_BYTES
        return Footprint((Segment("activations", held),))

    def load(self, ctx: Context) -> None:
        import torch

        torch.set_num_threads(ctx.threads)
        generator = torch.Generator().manual_seed(self.args.seed)
        size = self.args.size
        self._steps_done = 0
        self._turn = torch.randn(size, size, generator=generator) / size**0.5
        self._state = torch.randn(size, size, generator=generator)
        self._scratch = torch.empty(size, size)
        # Written, not only reserved: untouched pages cost no memory.
        self._ballast = torch.full((self.args.memory_bytes,), 1, dtype=torch.uint8)

    def step(self, ctx: Context) -> Report | Done:
        import torch

        args = self.args
        if args.steps and self._steps_done >= args.steps:
            checksum = float(self._state.double().sum())
            return Done(args.exit_status, result={"steps": self._steps_done, "checksum": checksum})
        if self._steps_done + 1 == args.fail_at:
            raise RuntimeError(f"spin was told to fail at step {args.fail_at}")
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

        end_s = time.thread_time() + busy_s
        while time.thread_time() < end_s:
            torch.mm(self._turn, self._state, out=self._scratch)

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        save_file({"state": self._state}, folder / "state.safetensors")
        (folder / "spin.json").write_text(json.dumps({"steps_done": self._steps_done}))

    def restore(self, folder: Path) -> None:
        from safetensors.torch import load_file

        # Cloned: a mapped file is not aligned, and kernels choose their path by alignment.
        self._state = load_file(folder / "state.safetensors")["state"].clone()
        self._steps_done = json.loads((folder / "spin.json").read_text())["steps_done"]
