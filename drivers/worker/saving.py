"""When a worker writes checkpoints, and how: beside the steps that follow, or between two.

Beside: the program's state is copied to host memory, which is all that the steps wait for; a
thread writes, syncs, checksums and renames while they go on. At most one is under way; what comes
due meanwhile follows it. Between two steps: where there is no memory for the copy, where a program
cannot be copied, and when the worker is to end. Either way the kernel hears of a checkpoint when
it is on the disk. A disk that takes none is told, and costs the run nothing but the checkpoint.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llmos.drivers.worker import checkpoint, memory
from llmos.kernel.units import Interval, parse_interval

if TYPE_CHECKING:
    from llmos.drivers.worker.copies import Copies

# A training that asks for no interval of its own loses at most this much to a crash.
CHECKPOINT_S = 60.0

KEEP = 2  # for a program without the argument


class Said(Protocol):
    """What the worker does with what comes of a checkpoint; may be called from any thread."""

    def __call__(self, folder: Path, step: int) -> None: ...


@dataclass(frozen=True)
class Plan:
    """How a process wants its checkpoints. `copy`: there is memory promised for one."""

    interval: Interval
    keep: int = KEEP
    copy: bool = False

    @classmethod
    def of(cls, args: Any, copy: bool, default_s: float) -> Plan:
        """From the arguments of a program; it need not have any of these."""
        chosen = parse_interval(getattr(args, "save_every", 0) or 0)
        return cls(
            chosen if chosen != Interval() else Interval(seconds=default_s),
            int(getattr(args, "keep", KEEP)),
            copy and not getattr(args, "save_in_place", False),
        )


class Writing:
    """A checkpoint that a thread is writing."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.folder: Path | None = None  # where it is, once it is on the disk
        self.error: BaseException | None = None
        self.wanted = True
        self._thread: threading.Thread | None = None

    def start(self, write: Callable[[], Path], saved: Said) -> None:
        self._thread = threading.Thread(
            target=self._run, args=(write, saved), name="checkpoint", daemon=True
        )
        self._thread.start()

    def _run(self, write: Callable[[], Path], saved: Said) -> None:
        try:
            self.folder = write()
            saved(self.folder, self.step)
        except checkpoint.Unwanted:
            pass
        except BaseException as exc:  # noqa: BLE001  it is raised where the steps are made
            self.error = exc

    @property
    def over(self) -> bool:
        return self._thread is not None and not self._thread.is_alive()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()


class Saver:
    """The checkpoints of one process. `saved` and `note` are told what came of each."""

    def __init__(
        self, root: Path, plan: Plan, device: str, saved: Said, note: Callable[[str], None]
    ) -> None:
        self._root, self._plan, self._device = root, plan, device
        self._saved, self._note = saved, note
        self._copies: Copies | None = None
        self._may_copy = plan.copy
        self._writing: Writing | None = None
        self._at = time.monotonic()  # of the last checkpoint, written or tried
        # Where the run stands, if that is on the disk or on its way there; -1: it has moved on.
        self._at_step = -1
        self._folder: Path | None = None  # of the last one that was written between steps
        self._due = False
        self.failed = ""  # why the disk did not take the last one; for the worker to tell
        self.paused_s = 0.0  # how long the steps have waited for checkpoints in all

    # ---- when ----

    def stepped(self, step: int) -> bool:
        """A step is done -> is a checkpoint due now?"""
        every = self._plan.interval
        if every.steps:
            self._due |= step % every.steps == 0
        else:
            self._due |= time.monotonic() - self._at > every.seconds
        self._look()
        return self._due and self._writing is None

    def restored(self, folder: Path) -> None:
        """The run stands where this checkpoint was written."""
        self._at_step, self._folder = checkpoint.step_of(folder), folder

    def moved_on(self) -> None:
        """A step is made: what was written is no longer where the run is."""
        self._at_step, self._folder = -1, None

    @property
    def busy(self) -> bool:
        """Is one being written?"""
        self._look()
        return self._writing is not None

    # ---- how ----

    @property
    def copy_bytes(self) -> int:
        """Host memory that the copy has now."""
        return 0 if self._copies is None else self._copies.bytes

    def reserve(self, program: Any) -> None:
        """Take the memory of the copy now, before the first measurement counts: what is promised
        for it stays promised. Without that memory checkpoints are written between steps."""
        if self._may_copy:
            self._capture(program)

    def beside(self, program: Any, step: int, others: Callable[[Path], None]) -> bool:
        """Copy, and have a thread write; False: that cannot be done. `others` has the other ranks
        write their part, at this very step, into the folder aside. Not while one is written."""
        began = time.monotonic()
        if self._is_there(step):
            return True
        write = self._capture(program) if self._may_copy else None
        if write is None:
            return False
        writing = Writing(step)

        def wanted() -> bool:
            return writing.wanted

        try:
            aside = checkpoint.begin(self._root)
            others(aside)
        except OSError as exc:
            self._unwritten(step, exc)
            return True
        fill, root, keep = write, self._root, self._plan.keep

        def run() -> Path:
            with checkpoint.writing(root):
                fill(aside)
                return checkpoint.finish(root, step, keep, wanted)

        self._writing = writing
        self._began(step)
        writing.start(run, self._saved)
        self.paused_s += time.monotonic() - began
        return True

    def between(self, step: int, fill: Callable[[Path], int | None]) -> int:
        """Write it while the steps wait -> its step, which `fill` may say is another. A run that
        is where it last wrote one writes none again. Raises what `fill` raises."""
        began = time.monotonic()
        self._finish_writing()
        if self._is_there(step):
            return step
        try:
            folder = checkpoint.write(self._root, step, fill, self._plan.keep)
        except checkpoint.Unwritten as exc:
            self._unwritten(step, exc)
            return step
        finally:
            self.paused_s += time.monotonic() - began
        step = checkpoint.step_of(folder)
        self._began(step)
        self._folder = folder
        self._saved(folder, step)
        return step

    def release(self) -> None:
        """Give the memory of the copy back, for good: from here on the steps wait."""
        if self._copies is None or self._device.startswith("cuda"):
            return
        self._finish_writing()
        self._copies, self._may_copy = None, False
        self._note("checkpoints are written between two steps from now on, to take less memory")

    def end(self, wanted: bool) -> None:
        """The run is over: what is being written is finished, or, when nobody wants it, dropped.
        Its error is nobody's any more."""
        if self._writing is not None:
            self._writing.wanted = wanted
            self._writing.wait()
            self._writing = None

    # ---- inside ----

    def _capture(self, program: Any) -> Callable[[Path], None] | None:
        from llmos.drivers.worker.copies import Copies

        try:
            if self._copies is None:
                self._copies = Copies(self._device)
            self._copies.begin()
            write: Callable[[Path], None] | None = program.capture(self._copies)
            self._copies.done()
        except Exception as exc:
            if memory.shortage(exc) is None:
                raise
            write = None
            self._note("no memory for a copy of the state: checkpoints are written between steps")
        if write is None:
            self._copies, self._may_copy = None, False
        return write

    def _is_there(self, step: int) -> bool:
        """Is what would be written on the disk already? Then whoever asked is told again."""
        if self._at_step != step or step < 0:
            return False
        self._due = False
        if self._folder is not None:
            self._saved(self._folder, step)
        return True

    def _began(self, step: int) -> None:
        self._at, self._at_step, self._due = time.monotonic(), step, False

    def _unwritten(self, step: int, exc: BaseException) -> None:
        self._began(-1)  # the next try is an interval away
        reason = os.strerror(exc.errno) if isinstance(exc, OSError) and exc.errno else str(exc)
        self.failed = reason
        self._note(f"no checkpoint of step {step}: {reason}; the one before stays")

    def _look(self) -> None:
        """What has become of the one under way? Raises what broke it, unless it was the disk."""
        writing = self._writing
        if writing is None or not writing.over:
            return
        self._writing = None
        if writing.error is not None:
            self._told(writing)
        elif self._at_step == writing.step:
            self._folder = writing.folder

    def _told(self, writing: Writing) -> None:
        error = writing.error
        assert error is not None
        if not isinstance(error, checkpoint.Unwritten):
            raise error
        self._unwritten(writing.step, error)

    def _finish_writing(self) -> None:
        if self._writing is not None:
            self._writing.wait()
            self._look()
