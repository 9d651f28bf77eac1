"""Moving out and back on the CPU path, against the raw bandwidth of the same path in the same run.

    python tests/bench/bench_moving.py [megabytes] [rounds] [folder]

Raw: the same bytes written in pieces of 64 MiB and synced; read back from the disk, not from the
page cache. A checkpoint is what moving out is on a CPU (then the worker ends); it is read twice:
once for its checksums, once for its tensors.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from llmos.drivers.worker import checkpoint
from llmos.drivers.worker.lanes import HostLane
from llmos.drivers.worker.mover import Mover

PIECE = 64 * 2**20


def training_state(nbytes: int) -> list[torch.Tensor]:
    """Weights, gradients and two moments of Adam: matrices, norms, and a scalar each."""
    found: list[torch.Tensor] = []
    generator = torch.Generator().manual_seed(0)
    while sum(t.nbytes for t in found) < nbytes:
        for shape in ((1024, 1024), (4096, 1024), (1024,)):
            found += [torch.randn(shape, generator=generator) for _ in range(4)]
        found.append(torch.tensor(1.0))
    return found


def drop_cache(folder: Path) -> None:
    """What is read next comes from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def raw(folder: Path, data: memoryview) -> tuple[float, float]:
    path = folder / "raw"

    def write() -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for at in range(0, len(data), PIECE):
            piece = data[at : at + PIECE]
            while piece:
                piece = piece[os.write(fd, piece) :]
        os.fsync(fd)
        os.close(fd)

    buffer = memoryview(bytearray(PIECE))

    def read() -> None:
        with path.open("rb", buffering=0) as f:
            while f.readinto(buffer):
                pass

    out_s = timed(write)
    drop_cache(folder)
    back_s = timed(read)
    path.unlink()
    return out_s, back_s


def moved(folder: Path, tensors: list[torch.Tensor]) -> tuple[float, float]:
    mover = Mover(HostLane(), folder)
    out_s = timed(lambda: mover.out(tensors, "disk"))
    drop_cache(folder)
    back_s = timed(mover.back)
    return out_s, back_s


def checkpointed(folder: Path, tensors: list[torch.Tensor]) -> tuple[float, float]:
    state = {str(n): t for n, t in enumerate(tensors)}
    out_s = timed(
        lambda: checkpoint.write(folder / "c", 1, lambda f: save_file(state, f / "s.safetensors"))
    )
    drop_cache(folder)

    def restore() -> None:
        found = checkpoint.newest(folder / "c", print)
        assert found is not None
        for name, tensor in load_file(found / "s.safetensors").items():
            state[name].copy_(tensor)

    return out_s, timed(restore)


def main(megabytes: int = 1000, rounds: int = 5, place: str = "") -> None:
    tensors = training_state(megabytes * 10**6)
    nbytes = sum(t.nbytes for t in tensors)
    before = [t.clone() for t in tensors]
    data = memoryview(bytearray(os.urandom(PIECE)) * -(-nbytes // PIECE))[:nbytes]
    rows: dict[str, list[tuple[float, float]]] = {"raw": [], "moved": [], "checkpoint": []}
    with tempfile.TemporaryDirectory(dir=place or None) as name:
        folder = Path(name)
        for _ in range(rounds):  # in turn, so that a busy disk is everybody's
            rows["raw"].append(raw(folder, data))
            rows["moved"].append(moved(folder, tensors))
            rows["checkpoint"].append(checkpointed(folder, tensors))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True)), "other bits"
    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores")
    print(f"{nbytes / 1e9:.2f} GB in {len(tensors)} tensors, {rounds} rounds; bit-identical\n")
    print("| path | out, GB/s | of raw | back, GB/s | of raw |\n|---|---|---|---|---|")
    for path, times in rows.items():
        cells = [path]
        for way in (0, 1):
            ratios = [r[way] / t[way] for r, t in zip(rows["raw"], times, strict=True)]
            speed = nbytes / 1e9 / statistics.median(t[way] for t in times)
            cells += [f"{speed:.2f}", f"{statistics.median(ratios):.2f}"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]), *sys.argv[3:4])
