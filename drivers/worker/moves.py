# ruff: noqa: TID253  (imported lazily, by workers only)
"""What a worker does with an order to move: the mover for its device, and plain answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from llmos.drivers.worker.lanes import CudaLane, HostLane
from llmos.drivers.worker.mover import Mover


class Moves:
    def __init__(self, device: str, folder: Path) -> None:
        lane = CudaLane(device) if device.startswith("cuda") else HostLane()
        self._mover = Mover(lane, folder)

    @property
    def is_out(self) -> bool:
        return bool(self._mover.where)

    def out(self, tensors: Iterable[Tensor], where: str) -> dict[str, Any]:
        """-> the fields of a `moved_out`. Raises LlmosError, and then nothing has moved."""
        return self._answer(self._mover.out(tensors, where))

    def back(self) -> dict[str, Any]:
        """-> the fields of a `moved_in`. Raises LlmosError."""
        return self._answer(self._mover.back())

    def _answer(self, moved: Any) -> dict[str, Any]:
        return {**asdict(moved), "host_bytes": self._mover.host_bytes}
