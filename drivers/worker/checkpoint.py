"""Checkpoints on disk: written aside, synced, checksummed, renamed; the newest good one is read.

A checkpoint is a folder `step-000000012` with what the program wrote and a `checksums.json`
(SHA-256 of each file). A folder without it, or whose files differ, is damaged and passed over.
Knows nothing of what is in the files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

CHECKSUMS = "checksums.json"


def write(root: Path, step: int, fill: Callable[[Path], None], keep: int = 2) -> Path:
    """Have `fill` write into a folder aside and make it the newest checkpoint -> its folder.

    The `keep` newest stay. When this returns, it is on the disk.
    """
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    aside, final = root / ".writing", root / f"step-{step:09d}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(mode=0o700)
    fill(aside)
    sums = {}
    for path in sorted(p for p in aside.rglob("*") if p.is_file()):
        sums[path.relative_to(aside).as_posix()] = _sha256(path)
        _sync(path)
    (aside / CHECKSUMS).write_text(json.dumps(sums, indent=1))
    _sync(aside / CHECKSUMS)
    for folder in [p for p in aside.rglob("*") if p.is_dir()] + [aside]:
        _sync(folder)
    replaced = root / ".replaced"  # one of the same step: whole until the new one is in place
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    aside.rename(final)
    _sync(root)
    shutil.rmtree(replaced, ignore_errors=True)
    for old in _folders(root)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def newest(root: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose checksums hold; damaged ones are named through `say`."""
    for folder in reversed(_folders(root)):
        problem = damage(folder)
        if problem is None:
            return folder
        say(f"checkpoint {folder.name} is damaged ({problem}); the one before it is taken")
    return None


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None when it is whole."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_text())
        wrong = [name for name, value in sums.items() if _sha256(folder / name) != value]
    except (OSError, ValueError, AttributeError) as exc:
        return str(exc)
    return f"{wrong[0]} has another checksum" if wrong else None


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.glob("step-*") if p.is_dir())


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
