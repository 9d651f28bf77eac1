"""Checkpoints on disk: written aside, synced, checksummed, renamed; the newest good one is read.

A checkpoint is a folder `step-000000012` with what the program wrote and a `checksums.json`
(SHA-256 of each file). A folder without it, or whose files differ, is damaged and passed over.
A writer that dies at any point leaves the checkpoint before it, or the new one, whole; what else it
leaves (`.writing`, `.replaced-step-...`) is put right by the next one who reads or writes.
Knows nothing of what is in the files.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

CHECKSUMS = "checksums.json"
WRITING = ".writing"
REPLACED = ".replaced-"

# What a disk says that has no room, or takes nothing any more: the run can go on without it.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ESTALE}

# Hashing and syncing look this often whether the checkpoint is still wanted.
_PIECE_BYTES = 1 << 22


class Unwritten(Exception):
    """The disk did not take a checkpoint: nothing of it is left, and the ones before are whole."""


class Unwanted(Exception):
    """Nobody wants the checkpoint any more: nothing of it is left."""


def write(root: Path, step: int, fill: Callable[[Path], int | None], keep: int = 2) -> Path:
    """Have `fill` write into a folder aside and make it the newest checkpoint -> its folder.

    It is named by `step`, or by what `fill` returns. The `keep` newest stay (0: all). When this
    returns, it is on the disk. Raises Unwritten when the disk did not take it.
    """
    with writing(root):
        written = fill(begin(root))
        return finish(root, step if written is None else written, keep)


@contextlib.contextmanager
def writing(root: Path) -> Iterator[None]:
    """Around `begin`, the filling and `finish`: what fails leaves nothing. Raises Unwritten for
    what the disk is to blame for, and everything else as it is."""
    try:
        yield
    except BaseException as exc:
        shutil.rmtree(root / WRITING, ignore_errors=True)
        recover(root)
        if _is_the_disks(exc):
            text = exc.strerror if isinstance(exc, OSError) else str(exc)
            raise Unwritten(text or type(exc).__name__) from exc
        raise


def begin(root: Path) -> Path:
    """The empty folder aside that a checkpoint is written into."""
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    recover(root)
    aside = root / WRITING
    aside.mkdir(mode=0o700)
    return aside


def finish(root: Path, step: int, keep: int = 2, wanted: Callable[[], bool] = lambda: True) -> Path:
    """What is in the folder aside becomes the newest checkpoint -> its folder.

    Ends with Unwanted as soon as `wanted` says so, before anything has changed.
    """
    aside, final = root / WRITING, root / f"step-{step:09d}"
    sums = {}
    for path in sorted(p for p in aside.rglob("*") if p.is_file()):
        sums[path.relative_to(aside).as_posix()] = _sha256(path, wanted)
        _sync(path)
    (aside / CHECKSUMS).write_text(json.dumps(sums, indent=1))
    _sync(aside / CHECKSUMS)
    for folder in [p for p in aside.rglob("*") if p.is_dir()] + [aside]:
        _sync(folder)
    if not wanted():
        raise Unwanted
    replaced = root / f"{REPLACED}{final.name}"  # one of the same step: whole until the new one is
    if final.exists():
        final.rename(replaced)
    aside.rename(final)
    _sync(root)
    shutil.rmtree(replaced, ignore_errors=True)
    _prune(root, step, keep)
    return final


def step_of(folder: Path) -> int:
    """The step at which a checkpoint was written, from its name."""
    return int(folder.name.removeprefix("step-"))


def recover(root: Path) -> None:
    """Put right what a writer left that died: nothing half is there, and nothing whole is lost."""
    shutil.rmtree(root / WRITING, ignore_errors=True)
    for replaced in root.glob(f"{REPLACED}step-*"):
        final = root / replaced.name.removeprefix(REPLACED)
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(final)


def newest(root: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose checksums hold; damaged ones are named through `say`.

    For the one who writes here: what an earlier writer left half is cleared away.
    """
    recover(root)
    folders = _folders(root)
    for number, folder in enumerate(reversed(folders), 1):
        problem = damage(folder)
        if problem is None:
            return folder
        before = "the one before it is taken" if number < len(folders) else "there is none before"
        say(f"checkpoint {folder.name} is damaged ({problem}); {before}")
    return None


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None when it is whole."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_text())
        wrong = [name for name, value in sums.items() if _sha256(folder / name) != value]
    except OSError as exc:
        name = Path(exc.filename).name if exc.filename else "a file"
        return f"{name}: {exc.strerror}"
    except (ValueError, AttributeError):
        return f"{CHECKSUMS} is torn"
    return f"{wrong[0]} has another checksum" if wrong else None


def _prune(root: Path, step: int, keep: int) -> None:
    """The `keep` newest stay. A run is at `step`: what lies beyond it was passed over as damaged,
    or belongs to steps that were never made; it must not push a good one out."""
    folders = _folders(root)
    beyond = [f for f in folders if step_of(f) > step]
    within = [f for f in folders if step_of(f) <= step]
    for old in beyond + (within[:-keep] if keep else []):
        shutil.rmtree(old, ignore_errors=True)


def _folders(root: Path) -> list[Path]:
    """From the oldest to the newest."""
    found = [p for p in root.glob("step-*") if p.is_dir() and p.name[5:].isdigit()]
    return sorted(found, key=step_of)


def _is_the_disks(exc: BaseException) -> bool:
    if isinstance(exc, OSError):
        return exc.errno in _DISK
    # By name: safetensors need not be imported to know its class. It says what the system said.
    return type(exc).__name__ == "SafetensorError" and "os error" in str(exc)


def _sha256(path: Path, wanted: Callable[[], bool] = lambda: True) -> str:
    found = hashlib.sha256()
    buffer = bytearray(_PIECE_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as f:
        while size := f.readinto(buffer):
            found.update(view[:size])
            if not wanted():
                raise Unwanted
    return found.hexdigest()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
