"""Three lines in your own training script: progress, safepoints and checkpoints under llmos.

    from llmos.services.steps import report, steps

    for batch in steps(loader, total=1000, save=save, load=load):
        ...
        report(loss=loss.item())

`save(folder)` writes all that decides what comes next into an empty folder; `load(folder)` brings
it back. Under `llmos exec` the process can then be stopped, moved out of memory or killed, and
goes on from its newest checkpoint: the steps that it has in it are passed over. Without llmos
`steps(loader)` is the loader, and `report` does nothing. Needs neither torch nor a kernel, and
loads in milliseconds.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# At most so often a script says how far it is: for people, and next to nothing to the script.
REPORT_S = 0.05


def steps(
    batches: Iterable[T],
    *,
    total: int | None = None,
    save: Callable[[Path], object] | None = None,
    load: Callable[[Path], object] | None = None,
) -> Iterator[T]:
    """The batches, one a step; a step is done when the next one is asked for.

    Several loops, one after the other (an epoch each), count on. `total` is the number of steps of
    all of them. `save` and `load` come together; without them there are no checkpoints. Between two
    steps the process may be ended, by SystemExit: what is in `finally` and `with` is run. The order
    of the batches must not depend on what the steps do: give a DataLoader that shuffles a generator
    of its own, so that passing over the first n leads to where the script was.
    """
    if (save is None) is not (load is None):
        raise ValueError("steps() takes save and load together: one is of no use without the other")
    run = current()
    run.begin(save, total)
    for batch in batches:
        if run.pass_over():
            continue
        run.bring_back(load)
        yield batch
        run.step_done()
    run.bring_back(load)  # the checkpoint may be of the very last step
    run.tell()


def report(**metrics: float) -> None:
    """Numbers about the step that is being made (loss=...), for `llmos top`, `ps` and `attach`."""
    current().metrics.update(metrics)


def step() -> int:
    """How many steps are done, those before a restart included."""
    return current().step


class Run:
    """The run of this script, and its line to the worker; without llmos there is none."""

    def __init__(self, address: str) -> None:
        self.step = 0
        self.total: int | None = None
        self.metrics: dict[str, float] = {}
        self.folder: Path | None = None  # the checkpoint it goes on from, until it has been loaded
        self._start = 0  # the step of that checkpoint
        self._save: Callable[[Path], object] | None = None
        self._told_at = 0.0
        self._can_save: bool | None = None  # as the worker was told
        self._line = _Line.to(address) if address else None
        if self._line is not None:
            hello = self._line.take()
            self._start = int(hello["step"])
            self.folder = Path(hello["folder"]) if hello["folder"] else None
            # All ranks of a distributed run go on from the checkpoint; one speaks and writes.
            if os.environ.get("RANK", "0") != "0":
                self._line = None

    @property
    def connected(self) -> bool:
        return self._line is not None

    def begin(self, save: Callable[[Path], object] | None, total: int | None) -> None:
        """A loop begins."""
        self._save, self.total = save, total if total is not None else self.total
        self.ready(can_save=save is not None)

    def ready(self, can_save: bool) -> None:
        """Tell the worker, once, and whenever it changes, whether there will be checkpoints."""
        if self._line is not None and can_save is not self._can_save:
            self._can_save = can_save
            self._line.give({"k": "ready", "can_save": can_save})

    def pass_over(self) -> bool:
        """Is this a step that the checkpoint has in it?"""
        if self.folder is None or self.step >= self._start:
            return False
        self.step += 1
        return True

    def bring_back(self, load: Callable[[Path], object] | None) -> None:
        """Load the checkpoint when its step has come."""
        if self.folder is None or self.step < self._start:
            return
        folder, self.folder = self.folder, None
        if load is None:
            raise RuntimeError(f"there is a checkpoint in {folder}, and steps() was given no load")
        load(folder)

    def step_done(self) -> None:
        """A step is done: a safepoint."""
        self.step += 1
        if self._line is None:
            return
        self.tell_now_and_then()
        if self._line.asked():
            self._come_to_rest()

    def tell_now_and_then(self) -> None:
        if time.monotonic() - self._told_at >= REPORT_S:
            self.tell()

    def tell(self) -> None:
        """Say how far it is."""
        if self._line is not None:
            self._told_at = time.monotonic()
            metrics = {name: float(value) for name, value in self.metrics.items()}
            self._line.give(
                {"k": "report", "step": self.step, "total": self.total, "metrics": metrics}
            )

    def _come_to_rest(self) -> None:
        """The worker wants us at a safepoint: write what it asks for, go on when it says so."""
        folder = self.at_safepoint()
        while folder is not None:
            assert self._save is not None, "the worker asks for a checkpoint that nobody offered"
            self._save(folder)
            folder = self.written()

    # ---- the safepoint in its parts, for a loop that is not ours (services/trainer.py) ----

    def asked(self) -> bool:
        """Does the worker want us at a safepoint?"""
        return self._line is not None and self._line.asked()

    def at_safepoint(self) -> Path | None:
        """Stand still -> the empty folder to write a checkpoint into; None: go on."""
        assert self._line is not None
        self.tell()
        self._line.give({"k": "at", "step": self.step})
        return self._order()

    def written(self) -> Path | None:
        """The checkpoint is written -> as `at_safepoint`."""
        assert self._line is not None
        self._line.give({"k": "written"})
        return self._order()

    def _order(self) -> Path | None:
        """What the worker wants of a script that stands still. It may be that it ends here."""
        assert self._line is not None
        while True:
            order = self._line.take()
            match order["k"]:
                case "write":
                    return Path(order["folder"])
                case "go":
                    return None
                case "stop":
                    sys.stderr.write("llmos: stopped at a safepoint, to go on from here later\n")
                    raise SystemExit(0)


class _Line:
    """Frames to and from the worker; the other end is services/programs/exec_channel.py."""

    def __init__(self, line: socket.socket) -> None:
        from llmos.kernel.wire import Unpacker, packer

        self._socket, self._unpacker, self._pack = line, Unpacker(), packer()
        self._waiting: list[dict[str, Any]] = []

    @classmethod
    def to(cls, address: str) -> _Line | None:
        line = socket.socket(socket.AF_UNIX)
        try:
            line.connect(address)
        except OSError as exc:
            line.close()
            sys.stderr.write(f"llmos: no worker listens at {address} ({exc.strerror}); "
                             "the script goes on without it\n")  # fmt: skip
            return None
        return cls(line)

    def give(self, message: dict[str, Any]) -> None:
        """Send; when the worker is gone this process is about to be ended, too."""
        try:
            self._socket.sendall(self._pack(message))
        except OSError:
            self._waiting.append({"k": "stop"})

    def asked(self) -> bool:
        """Has the worker said something?"""
        if not self._waiting:
            try:
                self._feed(self._socket.recv(1 << 16, socket.MSG_DONTWAIT))
            except BlockingIOError:
                return False
            except OSError:
                self._feed(b"")
        return bool(self._waiting)

    def take(self) -> dict[str, Any]:
        """The next thing that the worker says."""
        while not self._waiting:
            try:
                self._feed(self._socket.recv(1 << 16))
            except OSError:
                self._feed(b"")
        return self._waiting.pop(0)

    def _feed(self, data: bytes) -> None:
        if data:
            self._waiting += self._unpacker.feed(data)
        else:
            self._waiting.append({"k": "stop"})


_run: Run | None = None


def current() -> Run:
    """The run of this process, begun when it is first asked for."""
    global _run
    if _run is None:
        _run = Run(os.environ.get("LLMOS_STEPS", ""))
    return _run
