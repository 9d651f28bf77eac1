"""Files in which weights lie as an engine multiplies with them, to be mapped by every engine.

What is made of a model's files once (another type, another order) is kept, so that a later start is
a mapping, and several engines of a model hold one copy. A file is known by what it was made of and
how: other weights, another type or another version have another name. It is a cache: it may be
deleted at any time (who has it mapped keeps it), and is made again when something is wrong with it.

A file is: MAGIC, the length of the header (8 bytes, little endian), the header (JSON: `sum`, the
SHA-256 of the rest of it; `key`; `source`, the model's folder; `tensors`; `bytes`), zeros up to a
page, and `bytes` bytes. Without torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAGIC = b"llmosW1\n"
PAGE = 4096
MOST_HEADER_BYTES = 64 << 20

# All such files together take at most this part of what the disk could give them.
SHARE_OF_DISK = 0.25
# So much is left to others on the disk.
LEFT_BYTES = 1 << 30

Key = dict[str, Any]
Table = list[list[Any]]  # name, type, shape, offset of each tensor


@dataclass(frozen=True)
class WeightFile:
    """A mapped file. `memory` may be written to: such pages become this process's own."""

    path: Path
    memory: mmap.mmap
    start: int  # where the first tensor begins


def folder_in(home: Path) -> Path:
    """Where the files lie: in the home, or, in another user's home, in the cache of this user.

    Another user's file would be trusted with what this user's engine computes.
    """
    with contextlib.suppress(OSError):
        if home.stat().st_uid == os.geteuid():
            return home / "weights"
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "llmos" / "weights"


def key_of(model: Path, files: list[Path], made_how: dict[str, str]) -> Key:
    """What tells one file from another: the model's files, and how it is made of them.

    Raises OSError.
    """
    config = (model / "config.json").read_bytes()
    return {
        "files": [_identity(path) for path in files],
        "config": hashlib.sha256(config).hexdigest(),
        **made_how,
    }


def path_of(folder: Path, model: Path, key: Key) -> Path:
    digest = hashlib.sha256(_canonical(key)).hexdigest()[:16]
    return folder / f"{model.name}-{digest}.weights"


def opened(path: Path, key: Key, table: Table) -> WeightFile | None:
    """The file, mapped; None when it is not there, or not what it should be."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError), path.open("rb") as file:
        found = os.fstat(file.fileno())
        header, start = _header(file.read(PAGE), file)
        right = header["key"] == key and header["tensors"] == table
        right = right and found.st_uid == os.geteuid()
        if right and found.st_size == start + header["bytes"]:
            with contextlib.suppress(OSError):  # it was used now
                os.utime(path)
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            if hasattr(mmap, "MADV_WILLNEED"):
                memory.madvise(mmap.MADV_WILLNEED)
            return WeightFile(path, memory, start)
    return None


def make(
    path: Path,
    key: Key,
    source: Path,
    table: Table,
    nbytes: int,
    fill: Callable[[memoryview], None],
) -> None:
    """Write a file: `fill` gets its memory, zeros, to write the tensors to.

    It is there whole or not at all, and stays when another process was faster. Raises OSError,
    also when the disk has no room for it.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    told = {"key": key, "source": str(source), "tensors": table, "bytes": nbytes}
    text = json.dumps({"sum": hashlib.sha256(_canonical(told)).hexdigest(), **told}).encode()
    head = MAGIC + len(text).to_bytes(8, "little") + text
    start = -(-len(head) // PAGE) * PAGE
    _make_room(path.parent, start + nbytes)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".making-") as file:
        # Reserved: a disk that is full while mapped memory is written would kill the process.
        os.posix_fallocate(file.fileno(), 0, start + nbytes)
        file.write(head)
        file.flush()
        memory = mmap.mmap(file.fileno(), start + nbytes)
        fill(memoryview(memory)[start:])
        memory.flush()
        os.fsync(file.fileno())
        try:
            os.link(file.name, path)
        except FileExistsError:
            # Another process made it meanwhile, or what is there is damaged.
            if opened(path, key, table) is None:
                os.link(file.name, f"{file.name}-whole")
                os.replace(f"{file.name}-whole", path)
    _sync(path.parent)


def forget(home: Path, model: Path) -> int:
    """Remove the files that were made of a model's folder -> how many bytes that frees."""
    freed = 0
    for path in _files(folder_in(home)):
        if _source(path) in (str(model), str(model.resolve())):
            freed += _remove(path)
    return freed


def _make_room(folder: Path, nbytes: int) -> None:
    """Remove what is of no use any more, then what was not used for longest. Raises OSError."""
    for path in folder.glob(".making-*"):
        # Whoever writes it goes on with a file without a name, and fails where it gets its own.
        if not _is_young(path):
            _remove(path)
    for path in _files(folder):
        if not _is_current(path):
            _remove(path)
    kept = sorted(_files(folder), key=lambda path: path.stat().st_mtime)
    total = sum(path.stat().st_size for path in kept)
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    limit = (free + total) * SHARE_OF_DISK
    for path in kept:
        if total + nbytes <= limit:
            break
        freed = _remove(path)
        total, free = total - freed, free + freed
    if nbytes > limit or nbytes + LEFT_BYTES > free:
        raise OSError(f"{folder} has no room for {nbytes} bytes of weights")


def _is_young(path: Path) -> bool:
    with contextlib.suppress(OSError):
        newest = max(p.stat().st_mtime for p in path.parent.iterdir())
        return path.stat().st_mtime > newest - 3600
    return False


def _is_current(path: Path) -> bool:
    """Whether the model's files are still those that it was made of."""
    try:
        with path.open("rb") as file:
            header, _ = _header(file.read(PAGE), file)
        return all(_stat(Path(known["path"])) == [known["size"], known["mtime_ns"]]
                   for known in header["key"]["files"])  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _source(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError), path.open("rb") as file:
        return str(_header(file.read(PAGE), file)[0]["source"])
    return ""


def _header(first: bytes, file: Any) -> tuple[dict[str, Any], int]:
    """The header and where the tensors begin. Raises ValueError, KeyError, TypeError."""
    length = int.from_bytes(first[len(MAGIC) : len(MAGIC) + 8], "little")
    if not first.startswith(MAGIC) or length > MOST_HEADER_BYTES:
        raise ValueError("not such a file")
    file.seek(len(MAGIC) + 8)
    header = json.loads(file.read(length))
    told = {name: header[name] for name in ("key", "source", "tensors", "bytes")}
    if header["sum"] != hashlib.sha256(_canonical(told)).hexdigest():
        raise ValueError("the header is damaged")
    return header, -(-(len(MAGIC) + 8 + length) // PAGE) * PAGE


def _identity(path: Path) -> dict[str, Any]:
    """A safetensors file, without reading its weights: its header, its size and when it changed."""
    path = path.resolve()
    size, mtime_ns = _stat(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, MOST_HEADER_BYTES))
    return {
        "path": str(path),
        "size": size,
        "mtime_ns": mtime_ns,
        "header": hashlib.sha256(header).hexdigest(),
    }


def _stat(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.weights"))


def _remove(path: Path) -> int:
    with contextlib.suppress(OSError):
        size = path.stat().st_size
        path.unlink()
        return size
    return 0


def _canonical(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
