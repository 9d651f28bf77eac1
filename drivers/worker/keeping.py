"""The checkpoints of the process in a worker: when its steps stand still for one, who has asked for
it, and who hears what came of it. How one is written is `saving`'s."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmos.drivers.worker import checkpoint
from llmos.drivers.worker.saving import CHECKPOINT_S, Plan, Saver
from llmos.kernel.errors import HomeUnusable, IllegalMove, TimedOut

if TYPE_CHECKING:
    from llmos.drivers.worker.main import Worker


class Stopped(BaseException):
    """The worker is to end at this safepoint."""


class Keeping:
    def __init__(self, worker: Worker, m: dict[str, Any]) -> None:
        """`m` is the order to load."""
        self._worker, self._program, self._team = worker, worker.program, worker.team
        self._root = worker.work / "checkpoints"
        copy = worker.device.startswith("cuda") or bool(m.get("copy"))
        plan = Plan.of(self._program.args, copy, float(m.get("checkpoint_s") or CHECKPOINT_S))
        self.saver = Saver(self._root, plan, worker.device, self._saved, self.note)
        self.step = 0  # where the run stands
        self._reserved = False
        self._checkpoint_wanted = False
        self._stop_wanted = False
        self._waited_for = False  # somebody has asked for the checkpoint that is made

    def restore(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        emit = self._worker.emit
        folder = checkpoint.newest(self._root, lambda text: emit("note", text=text))
        if folder is None:
            return
        self._team.tell({"k": "restore", "folder": str(folder)})
        self._program.restore(folder)
        self.step = checkpoint.step_of(folder)
        self.saver.restored(folder)
        emit("restored", step=self.step)

    # ---- orders ----

    def stop(self) -> None:
        """To a safepoint, and out. Raises Stopped, now or after the step that is made."""
        self._stop_wanted = True
        if not self._program.has_checkpoint:
            raise Stopped
        if self.step:
            self.save()

    def ask(self) -> None:
        """Somebody wants a checkpoint."""
        self._checkpoint_wanted = True
        if self.step and not self.saver.busy:
            self.save()

    # ---- between steps ----

    def stepped(self) -> None:
        """A step was reported. Raises Stopped."""
        if self._program.has_checkpoint:
            self._save_if_due()
            self._tell_unwritten()
        if self._stop_wanted:
            raise Stopped

    def _save_if_due(self) -> None:
        due = self.saver.stepped(self.step)
        if not self._reserved:
            self._reserved = True  # before the second step, which is the first that is measured
            self.saver.reserve(self._program)
        if due or self._stop_wanted or (self._checkpoint_wanted and not self.saver.busy):
            self.save()

    def save(self, beside: bool = True) -> None:
        """Write a checkpoint, or have one written; a worker that is to stop has then stopped."""
        try:
            # What it takes from the device goes through the copy engine: nobody's time.
            with self._worker.gate.away():
                beside = beside and not self._stop_wanted
                if not (beside and self.saver.beside(self._program, self.step, self._others_fill)):
                    self.step = self.saver.between(self.step, self._fill)
        except IllegalMove:
            self._checkpoint_wanted = self._stop_wanted = False  # it is about to end by itself
            return
        except TimedOut as exc:
            self.note(f"no checkpoint: {exc.message}")
        self._waited_for = self._waited_for or self._checkpoint_wanted or self._stop_wanted
        self._checkpoint_wanted = False
        self._tell_unwritten()
        if self._stop_wanted:
            raise Stopped  # where there is no new one, it goes on from the one before

    def _fill(self, folder: Path) -> int | None:
        """Everything goes into the checkpoint that any rank has to say -> the step, if it is
        another than the last that was reported."""
        self._team.tell({"k": "save", "folder": str(folder)})
        step: int | None = self._program.save(folder)
        self._team.await_saved()
        return step

    def _others_fill(self, folder: Path) -> None:
        """What the other ranks have to say; it is little, and they are at the same step now."""
        self._team.tell({"k": "save", "folder": str(folder)})
        self._team.await_saved()

    # ---- what came of it ----

    def note(self, text: str) -> None:
        """One line for the user; a disk that is full may have no room for it either."""
        with contextlib.suppress(OSError):
            self._worker.emit("note", text=text)

    def _saved(self, folder: Path, step: int) -> None:
        """A checkpoint is on the disk. In any thread."""
        told = {"k": "checkpointed", "folder": str(folder), "step": step}
        self._worker.link.post(told, keep=True)

    def _tell_unwritten(self) -> None:
        """The disk took no checkpoint. Steps are worth more: it goes on; who has asked for one, or
        for its memory, is told that there is none."""
        busy = self.saver.busy  # first: it looks what has become of the one that was written
        why, self.saver.failed = self.saver.failed, ""
        if why and self._waited_for:
            self._waited_for = self._stop_wanted = False
            error = HomeUnusable(f"no room for a checkpoint: {why}").to_wire()
            told = {"k": "move_failed", "what": "checkpoint", "error": error}
            self._worker.link.post(told, keep=True)
        elif not busy:
            self._waited_for = False
