"""What a worker has on its device: how much, how far it may go, and its way out and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmos.drivers.worker.gate import Gate
from llmos.kernel.errors import NoMemory

if TYPE_CHECKING:
    from torch import Tensor

    from llmos.drivers.worker.moves import Moves


class OnDevice:
    def __init__(self, device: str, work: Path) -> None:
        self._device, self._folder = device, work / "moved"
        self._moves: Moves | None = None  # made with the first order to move

    @property
    def is_cuda(self) -> bool:
        return self._device.startswith("cuda")

    def prepare(self, gate: Gate) -> None:
        """Before anything is allocated."""
        if self.is_cuda:
            from llmos.drivers.worker import cuda

            cuda.prepare(self._device)
            gate.use(cuda.CudaStreams(self._device))

    def bytes(self) -> dict[str, int]:
        """What this worker holds, where only the worker itself may know."""
        if not self.is_cuda:
            return {}
        from llmos.drivers.worker import cuda

        return {"device_bytes": cuda.reserved_bytes(self._device)}

    def limit(self, nbytes: int) -> None:
        """Elsewhere than on CUDA the limit is set from outside."""
        if self.is_cuda:
            from llmos.drivers.worker import cuda

            cuda.limit(self._device, nbytes)

    # ---- moves ----

    @property
    def is_out(self) -> bool:
        return self._moves is not None and self._moves.is_out

    def move_out(self, tensors: Callable[[], Iterable[Tensor]], where: str) -> dict[str, Any]:
        """-> what the kernel is told."""
        from llmos.drivers.worker.moves import Moves

        moves = self._moves = self._moves or Moves(self._device, self._folder)
        return self._answer("moved_out", lambda: moves.out(tensors(), where))

    def move_in(self) -> dict[str, Any] | None:
        """-> what the kernel is told; None when nothing was out."""
        moves = self._moves
        if moves is None or not moves.is_out:
            return None
        return self._answer("moved_in", moves.back)

    def _answer(self, what: str, move: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Do it; a move without room for it has changed nothing, and that is told."""
        try:
            answer = {"k": what, **move()}
        except NoMemory as exc:
            answer = {"k": "move_failed", "what": what, "error": exc.to_wire()}
        return {**answer, **self.bytes()}
