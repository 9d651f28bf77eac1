"""The gate: where a worker can be held on a device that no signal stops.

SIGSTOP stops an OS process, not the kernels that it has queued on a GPU. So there a hold is asked
for: the thread that reads the kernel's messages notes it, and the thread that computes looks at
the note between layers, between micro-batches and in the optimizer. If it is there, it waits for
the device to do what is queued, says "held", and sleeps until the lease comes back. Looking costs
one attribute read.

Messages: `hold` (n) comes in; `held` (n, took_s, longest_s) goes out: once for each hold, when the
device has nothing of this worker to do any more; `lease` ends it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from llmos.drivers.worker.pace import Pacer, Streams

# Of so many holds the times are kept, for `statistics`.
REMEMBERED = 1000


class Gate:
    """Open until the kernel asks for a hold. Without `streams` there is nothing to wait for."""

    def __init__(
        self,
        post: Callable[[dict[str, Any]], None],
        streams: Streams | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._post, self._clock = post, clock
        self._pacer = Pacer(streams) if streams is not None else None
        self._asked = 0  # the number of the hold that is wanted; 0: none
        self._asked_at = 0.0
        self._told = 0
        self._off = 0  # places in which the worker waits or does nothing on the device
        self._changed = threading.Condition()
        self._took: deque[float] = deque(maxlen=REMEMBERED)

    @property
    def active(self) -> bool:
        """Is this how the worker is held? Then programs put boundaries into their steps."""
        return self._pacer is not None

    def use(self, streams: Streams) -> None:
        """The worker has got its device."""
        self._pacer = Pacer(streams)

    # ---- the thread that computes ----

    def check(self) -> None:
        """Stop here if somebody asks."""
        if self._asked:
            self._stop_here()

    def boundary(self, name: str) -> None:
        """Work called `name` is queued next: stop here if somebody asks, and keep the queue short.

        May be called from any thread that queues work (backward has a thread of its own), by one
        at a time.
        """
        if self._asked:
            self._stop_here()
        if self._pacer is not None:
            self._pacer.boundary(name)

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Around what takes long and computes nothing on the device: a hold in it takes effect
        at once, and its end waits for the lease."""
        self._leave()
        try:
            yield
        finally:
            self._wait_for_lease()

    def _stop_here(self) -> None:
        self._leave()
        self._wait_for_lease()

    def _leave(self) -> None:
        if self._pacer is not None:
            self._pacer.empty()
        with self._changed:
            self._off += 1
            self._tell_if_asked()

    def _wait_for_lease(self) -> None:
        with self._changed:
            while self._asked:
                self._changed.wait()
            self._off -= 1

    # ---- the thread that reads messages ----

    def hears(self, message: dict[str, Any]) -> bool:
        """Take a message -> whether it was for the gate alone."""
        if message["k"] == "hold":
            self._ask(int(message["n"]))
            return True
        if message["k"] == "lease":
            self._open()
        return False

    def give_up(self) -> None:
        """No kernel is there any more that could end a hold."""
        self._open()

    def _ask(self, number: int) -> None:
        with self._changed:
            if not self._asked:
                self._asked_at = self._clock()
            self._asked = number
            if self._off:
                self._tell_if_asked()

    def _open(self) -> None:
        with self._changed:
            self._asked = self._told = 0
            self._changed.notify_all()

    def _tell_if_asked(self) -> None:
        """With the lock: the device is free of this worker, and stays so until it is opened."""
        if not self._asked or self._told == self._asked:
            return
        took_s = self._clock() - self._asked_at
        if not self._told:
            self._took.append(took_s)
        self._told = self._asked
        self._post({"k": "held", "n": self._asked, "took_s": took_s, "longest_s": self.longest_s})

    # ---- figures ----

    @property
    def longest_s(self) -> float:
        """The longest work between two boundaries, of what is to be expected."""
        return self._pacer.longest_s if self._pacer is not None else 0.0

    def took_s(self) -> list[float]:
        """How long the last holds took, from the message to the device being free."""
        return list(self._took)
