"""The order in which examples are seen: a permutation per epoch, resumable at any place.

It does not know what the examples are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


class Order:
    """Endless indices in [0, count): each epoch is a permutation that depends on seed and epoch.

    The state is two numbers: a generator is never carried over, so that any place of any epoch
    can be reached without the way to it.
    """

    def __init__(self, count: int, seed: int) -> None:
        if count < 1:
            raise ValueError("there is nothing to order")
        self.count = count
        self.seed = seed
        self.epoch = 0
        self.position = 0
        self._permutation = self._permute()

    def take(self, n: int) -> npt.NDArray[np.int64]:
        """The next `n` indices; a batch may go on into the next epoch."""
        parts = []
        while n:
            if self.position == self.count:
                self.epoch, self.position = self.epoch + 1, 0
                self._permutation = self._permute()
            part = self._permutation[self.position : self.position + n]
            parts.append(part)
            self.position += len(part)
            n -= len(part)
        return np.concatenate(parts)

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def restore(self, state: dict[str, Any]) -> None:
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self._permutation = self._permute()

    def _permute(self) -> npt.NDArray[np.int64]:
        rng = np.random.Generator(np.random.PCG64([self.seed, self.epoch]))
        return rng.permutation(self.count)
