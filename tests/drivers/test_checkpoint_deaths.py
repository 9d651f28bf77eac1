"""A writer of checkpoints that dies anywhere, and a disk that takes nothing more."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from llmos.drivers.worker import checkpoint


def fill(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "state.json").write_text(json.dumps({"text": text}))
        (folder / "inner").mkdir()
        (folder / "inner" / "more").write_bytes(text.encode() * 1000)

    return write


def read(folder: Path) -> str:
    text: str = json.loads((folder / "state.json").read_text())["text"]
    assert (folder / "inner" / "more").read_bytes() == text.encode() * 1000
    return text


def in_child(work: Callable[[], object]) -> int:
    """Run it in a fork -> how that ended, as the system says it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def dying(line: int, work: Callable[[], object]) -> Callable[[], object]:
    """`work`, killed before the line of the module `checkpoint` that is run as the `line`-th."""
    left = line

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename != checkpoint.__file__:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    def run() -> object:
        sys.settrace(trace)
        return work()

    return run


@pytest.mark.parametrize(
    ("steps", "keep"),
    [
        ((5, 5), 1),
        *(
            pytest.param(steps, keep, marks=pytest.mark.long)
            for steps, keep in (((5, 6, 7), 2), ((5, 6, 6), 2), ((5,), 2), ((5, 6), 1))
        ),
    ],
)
def test_killed_at_any_line_a_writer_leaves_the_old_one_or_the_new_one_whole(
    tmp_path: Path, steps: tuple[int, ...], keep: int
) -> None:
    *before, last = steps
    seen = set()
    # A fork of a test process takes its time: by default every fourth line.
    for line in itertools.count(step=4 if (steps, keep) == ((5, 5), 1) else 1):
        root = tmp_path / f"{line}"
        for number, step in enumerate(before):
            checkpoint.write(root, step, fill(f"old {number}"), keep)
        ended = in_child(
            dying(line, lambda root=root: checkpoint.write(root, last, fill("new"), keep))  # type: ignore[misc]
        )
        said: list[str] = []
        found = checkpoint.newest(root, said.append)
        text = read(found) if found is not None else None
        assert text in ("new", f"old {len(before) - 1}" if before else None), line
        assert said == [], "what is half is aside, and never looked at"
        assert {p.name[:5] for p in root.glob("*")} <= {"step-"}, "nothing else is left"
        seen.add(text)
        again = checkpoint.write(root, last + 1, fill("next"), keep)
        assert len(list(root.iterdir())) <= keep
        assert checkpoint.newest(root, said.append) == again
        if ended == 0:
            break
        assert os.WTERMSIG(ended) == signal.SIGKILL
    assert line > 40, "it was killed in the middle, and often"
    assert len(seen) == 2


def test_all_is_on_the_disk_before_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def synced(fd: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{fd}").removeprefix(str(tmp_path)))
        fsync(fd)

    def renamed(path: Path, target: Path) -> Path:
        done.append(f"{path.name} -> {Path(target).name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    checkpoint.write(tmp_path, 1, fill("x"))
    *inside, name, folder = done
    assert (name, folder) == (".writing -> step-000000001", "")
    assert set(inside) == {
        f"/.writing{p}" for p in ("", "/inner", "/inner/more", "/state.json", "/checksums.json")
    }


def test_a_disk_that_is_full_costs_the_new_one_only(tmp_path: Path) -> None:
    """The system's own refusal: a limit on the size of files says EFBIG as a full disk ENOSPC."""
    checkpoint.write(tmp_path, 1, fill("old"))

    def try_it() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
        try:
            checkpoint.write(tmp_path, 2, fill("new"))
        except checkpoint.Unwritten as exc:
            os._exit(0 if str(exc) == "File too large" else 3)
        os._exit(4)

    assert in_child(try_it) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001"]


def test_safetensors_says_of_a_full_disk_what_the_system_says(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    def full(_: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space (os error 28)")

    def wrong(_: Path) -> None:
        raise SafetensorError("Error while serializing: InvalidTensorView")

    with pytest.raises(checkpoint.Unwritten, match="os error 28"):
        checkpoint.write(tmp_path, 2, full)
    with pytest.raises(SafetensorError):
        checkpoint.write(tmp_path, 2, wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_what_the_disk_refuses_is_no_fault_of_the_program(tmp_path: Path, number: int) -> None:
    def refuse(_: Path) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(checkpoint.Unwritten, match=os.strerror(number)):
        checkpoint.write(tmp_path, 2, refuse)


def test_any_other_error_is_the_programs(tmp_path: Path) -> None:
    def wrong(_: Path) -> None:
        raise FileNotFoundError(errno.ENOENT, "no such file", "x")

    with pytest.raises(FileNotFoundError):
        checkpoint.write(tmp_path, 2, wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("keep", "left"), [(1, [9]), (2, [8, 9]), (3, [7, 8, 9]), (0, [5, 7, 8, 9])]
)
def test_so_many_stay(tmp_path: Path, keep: int, left: list[int]) -> None:
    for step in (5, 7, 8, 9):
        checkpoint.write(tmp_path, step, fill("x"), keep)
    assert sorted(checkpoint.step_of(p) for p in tmp_path.iterdir()) == left


def test_a_damaged_one_pushes_no_good_one_out(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.write(tmp_path, step, fill("x"))
    (tmp_path / "step-000000003" / "state.json").write_text("{")
    said: list[str] = []
    assert checkpoint.newest(tmp_path, said.append) == tmp_path / "step-000000002"
    # The run goes on from 2, and comes by.
    checkpoint.write(tmp_path, 3, fill("again"))
    checkpoint.write(tmp_path, 4, fill("x"))
    assert sorted(checkpoint.step_of(p) for p in tmp_path.iterdir()) == [3, 4]
    (tmp_path / "step-000000004" / "inner" / "more").unlink()
    checkpoint.newest(tmp_path, said.append)
    checkpoint.write(tmp_path, 3, fill("and again"))
    assert [checkpoint.step_of(p) for p in tmp_path.iterdir()] == [3]
    assert said == [
        "checkpoint step-000000003 is damaged (state.json has another checksum); "
        "the one before it is taken",
        "checkpoint step-000000004 is damaged (more: No such file or directory); "
        "the one before it is taken",
    ]


def test_one_that_nobody_wants_any_more_is_dropped(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, 1, fill("old"))

    def write() -> None:
        with checkpoint.writing(tmp_path):
            fill("new")(checkpoint.begin(tmp_path))
            checkpoint.finish(tmp_path, 2, wanted=lambda: False)

    with pytest.raises(checkpoint.Unwanted):
        write()
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001"]
