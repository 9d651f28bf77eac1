# ruff: noqa: TID253  (imported lazily, by workers only)
"""One training on several devices: who takes which examples, and what the ranks tell each other.

Every rank has the whole model and the whole order of examples. Of each micro-batch of all ranks
it takes its part; gradients and losses are summed. What follows from these sums (the clipped
gradient, the optimizer's step, the next phase) every rank works out for itself, to the same bits.
A training on one device is a gang of one, for which everything here is free.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from llmos.services.programs import lm_state
from llmos.services.programs.base import Context

Made = TypeVar("Made")


class Gang:
    """This rank among all ranks."""

    def __init__(self, ctx: Context) -> None:
        self.rank, self.size = ctx.rank, ctx.ranks
        self._device = ctx.device

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def part(self, indices: npt.NDArray[np.int64], batch: int) -> npt.NDArray[np.int64]:
        """This rank's part of `size` x `batch` examples (the last micro-batch may be shorter)."""
        return indices[self.rank * batch : (self.rank + 1) * batch]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def sums(self, *values: float) -> list[float]:
        """The sums of plain numbers over all ranks, in float64."""
        if self.size == 1:
            return list(values)
        both: list[float] = self.sum(
            torch.tensor(values, dtype=torch.float64, device=self._device)
        ).tolist()
        return both

    def as_first(self, value: float) -> float:
        """The value that rank 0 has: for what each would measure differently."""
        return self.sums(value if self.leads else 0.0)[0]

    def in_turn(self, make: Callable[[], Made]) -> Made:
        """Rank 0 makes it first, the others find what it left on the disk."""
        if not self.leads:
            dist.barrier()
        made = make()
        if self.leads and self.size > 1:
            dist.barrier()
        return made

    def part_ways(self, seed: int) -> None:
        """From here on each rank draws its own dropout; until here all drew the same weights."""
        if not self.leads:
            lm_state.seed_all((seed + self.rank * 0x9E3779B1) % (1 << 63))

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model whose backward pass averages the gradients over the ranks."""
        if self.size == 1:
            return model
        # The gradients lie in the buckets that are summed: no copy, no second memory.
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        # torch 2.13 renames it, and warns about the old name.
        sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {sync: False, "gradient_as_bucket_view": True}
        wrapped = DistributedDataParallel(model, **options)
        self._rehearse(wrapped)
        return wrapped

    def _rehearse(self, wrapped: DistributedDataParallel) -> None:
        """One backward pass for nothing.

        DDP orders its buckets anew after the first one, and with more than two ranks the order
        decides how sums round. A restored run must begin with the buckets of the one before.
        """
        ids = torch.zeros((1, 2), dtype=torch.int64, device=self._device)
        torch.autograd.backward(wrapped(input_ids=ids, use_cache=False).logits.sum() * 0.0)
        wrapped.zero_grad(set_to_none=False)

    def gathering(self, wrapped: torch.nn.Module, last: bool) -> AbstractContextManager[None]:
        """Around a micro-batch: ranks meet in the backward pass of the `last` one of a step."""
        if last or not isinstance(wrapped, DistributedDataParallel):
            return nullcontext()
        return wrapped.no_sync()
