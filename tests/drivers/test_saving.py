"""When a worker writes checkpoints, beside its steps and between them."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmos.drivers.worker import checkpoint, saving
from llmos.drivers.worker.copies import Copies
from llmos.drivers.worker.saving import Plan, Saver
from llmos.kernel.units import Interval
from support.real import wait_until


class Counter:
    """A program whose state is one tensor that counts its steps, in place."""

    def __init__(self, size: int = 1000) -> None:
        self.state = torch.zeros(size)
        self.may_write = threading.Event()  # the writing waits for it
        self.may_write.set()
        self.error: BaseException | None = None
        self.can_capture = True

    def step(self) -> None:
        self.state += 1

    def save(self, folder: Path) -> None:
        save_file({"state": self.state}, folder / "s.safetensors")

    def capture(self, keep: Callable[[Any], Any]) -> Callable[[Path], None] | None:
        if not self.can_capture:
            return None
        kept = keep(self.state)

        def write(folder: Path) -> None:
            assert self.may_write.wait(60)
            if self.error is not None:
                raise self.error
            save_file({"state": kept}, folder / "s.safetensors")

        return write


class Bench:
    """A Saver with its program, driven as a worker drives it."""

    def __init__(self, root: Path, plan: Plan | None = None, **program: Any) -> None:
        self.root, self.program = root, Counter(**program)
        self.told: list[int] = []
        self.notes: list[str] = []
        self.saver = Saver(
            root, plan or Plan(Interval(steps=2), 2, True), "cpu",
            lambda folder, step: self.told.append(step), self.notes.append,
        )  # fmt: skip
        self.step = 0

    def steps(self, count: int) -> Bench:
        for _ in range(count):
            self.saver.moved_on()
            self.program.step()
            self.step += 1
            if self.saver.stepped(self.step):
                self.save()
        return self

    def save(self) -> None:
        if not self.saver.beside(self.program, self.step, lambda folder: None):
            self.between()

    def between(self) -> None:
        self.saver.between(self.step, self.program.save)

    def written(self) -> Bench:
        wait_until(lambda: not self.saver.busy, "the writing to end")
        return self

    def on_disk(self) -> dict[int, float]:
        """What each checkpoint has counted, by its step."""
        return {
            checkpoint.step_of(f): float(load_file(f / "s.safetensors")["state"][0])
            for f in sorted(self.root.glob("step-*"))
        }


def test_steps_go_on_while_a_checkpoint_of_before_is_written(tmp_path: Path) -> None:
    b = Bench(tmp_path)
    b.program.may_write.clear()
    b.steps(3)
    assert b.saver.busy
    assert (b.told, b.on_disk()) == ([], {}), "told when it is on the disk, not before"
    b.program.may_write.set()
    b.written()
    assert (b.told, b.on_disk()) == ([2], {2: 2.0})


def test_what_comes_due_meanwhile_follows_and_one_is_under_way_at_most(tmp_path: Path) -> None:
    b = Bench(tmp_path)
    b.program.may_write.clear()
    b.steps(7)
    b.program.may_write.set()
    b.written().steps(1).written()
    assert b.told == [2, 8]
    assert b.on_disk() == {2: 2.0, 8: 8.0}


def test_a_stop_waits_for_what_is_under_way_and_then_writes_where_it_is(tmp_path: Path) -> None:
    b = Bench(tmp_path)
    b.program.may_write.clear()
    b.steps(3)
    threading.Timer(0.05, b.program.may_write.set).start()
    b.between()
    assert b.told == [2, 3]
    assert b.on_disk() == {2: 2.0, 3: 3.0}


def test_a_run_that_is_where_it_last_wrote_is_told_and_writes_nothing(tmp_path: Path) -> None:
    b = Bench(tmp_path).steps(2).written()
    seen = os.stat(tmp_path / "step-000000002").st_ino
    b.between()
    b.save()
    assert set(b.told) == {2}
    assert os.stat(tmp_path / "step-000000002").st_ino == seen
    later = Bench(tmp_path)
    later.saver.restored(tmp_path / "step-000000002")
    later.step = 2
    later.between()
    assert os.stat(tmp_path / "step-000000002").st_ino == seen
    later.steps(1).between()
    assert later.on_disk().keys() == {2, 3}


@pytest.mark.parametrize("beside", [True, False])
def test_a_full_disk_is_told_and_the_run_goes_on(tmp_path: Path, beside: bool) -> None:
    b = Bench(tmp_path, Plan(Interval(steps=2), 2, beside)).steps(2).written()
    b.program.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if not beside:
        b.program.save = lambda folder: (_ for _ in ()).throw(b.program.error)  # type: ignore
    b.steps(2).written()
    b.steps(1)
    assert b.notes == ["no checkpoint of step 4: No space left on device; the one before stays"]
    assert b.on_disk() == {2: 2.0}
    b.program.error = None
    b.program.save = lambda folder: Counter.save(b.program, folder)  # type: ignore[method-assign]
    b.steps(1).written()
    assert b.on_disk() == {2: 2.0, 6: 6.0}


def test_an_error_of_the_program_is_raised_where_it_makes_its_steps(tmp_path: Path) -> None:
    b = Bench(tmp_path)
    b.program.error = ValueError("what is this?")
    b.steps(2)
    with pytest.raises(ValueError, match="what is this"):
        b.written()


@pytest.mark.parametrize("wanted", [True, False])
def test_at_the_end_it_is_finished_or_dropped(tmp_path: Path, wanted: bool) -> None:
    b = Bench(tmp_path)
    b.program.may_write.clear()
    b.steps(2)
    threading.Timer(0.05, b.program.may_write.set).start()
    b.saver.end(wanted)
    assert b.on_disk() == ({2: 2.0} if wanted else {})
    assert not (tmp_path / checkpoint.WRITING).exists()


def test_a_program_that_cannot_be_copied_stands_still(tmp_path: Path) -> None:
    b = Bench(tmp_path)
    b.program.can_capture = False
    b.steps(2)
    assert (b.told, b.notes) == ([2], [])


def test_without_memory_for_the_copy_it_stands_still_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    b = Bench(tmp_path)
    short = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    monkeypatch.setattr(Copies, "_memory", lambda *_: (_ for _ in ()).throw(short))
    b.saver.reserve(b.program)
    b.steps(2)
    assert b.told == [2]
    assert b.notes == ["no memory for a copy of the state: checkpoints are written between steps"]


def test_the_copy_is_taken_once_used_again_and_given_back(tmp_path: Path) -> None:
    b = Bench(tmp_path, size=2**20)
    b.saver.reserve(b.program)
    assert b.saver.copy_bytes == 4 * 2**20
    b.steps(2).written().steps(2).written()
    assert b.saver.copy_bytes == 4 * 2**20
    b.saver.release()
    b.saver.release()
    assert b.saver.copy_bytes == 0
    assert len(b.notes) == 1
    b.steps(2)
    assert b.told == [2, 4, 6]


def test_time_is_counted_from_checkpoint_to_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(saving.time, "monotonic", lambda: now)
    b = Bench(tmp_path, Plan(Interval(seconds=60), 2, False)).steps(1)
    now += 60.1
    b.steps(1)
    now += 59.9
    b.steps(1)
    assert b.told == [2]
    now += 0.2
    assert b.steps(1).told == [2, 4]


def test_what_arguments_say_and_what_holds_without_them() -> None:
    class Args:
        save_every, keep, save_in_place = "10min", 5, True

    class Old:
        save_every = 0  # as journals of 0.1 have it

    assert Plan.of(Args, True, 60.0) == Plan(Interval(seconds=600), 5, False)
    assert Plan.of(Old, True, 60.0) == Plan(Interval(seconds=60), 2, True)
    assert Plan.of(object(), False, 7.0) == Plan(Interval(seconds=7), 2, False)


# ---- copies ----


def test_tied_weights_are_tied_in_the_copy_and_others_are_not() -> None:
    from transformers.pytorch_utils import id_tensor_storage

    one, other = torch.randn(5, 7), torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last)
    copies = Copies("cpu")
    kept = [copies(t) for t in (one, one.view(7, 5), one[1:3], other, torch.tensor(3.0), one[:0])]
    copies.done()
    one.zero_()
    assert torch.equal(kept[0].view(7, 5), kept[1])
    assert torch.equal(kept[0][1:3], kept[2])
    assert torch.equal(kept[3], other)
    assert kept[3].is_contiguous()
    assert float(kept[4]) == 3.0
    ids = [id_tensor_storage(t) for t in kept[:5]]
    assert ids[0] == ids[1]
    assert len({ids[0], ids[3], ids[4]}) == 3
    assert all(t.data_ptr() % 64 == 0 for t in (kept[0], kept[3], kept[4]))


def test_a_note_of_where_it_stands_is_json(tmp_path: Path) -> None:
    folder = checkpoint.write(tmp_path, 1, Counter().save)
    assert json.loads((folder / checkpoint.CHECKSUMS).read_text()).keys() == {"s.safetensors"}
