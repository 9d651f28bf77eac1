"""The model of the allocator takes as much as the C library's does, for the same tensors."""

from __future__ import annotations

import json
import os
import platform
import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.drivers.zygote import environment
from llmos.services.model.heap import LAST_THRESHOLD, TOP_PAD, Heap

MIB = 1 << 20

Script = list[tuple[int, int]]  # (key, bytes; 0: it goes)

# Prints the most that the C library had from the system, beyond what it had before.
REAL = """
import ctypes, json, sys

class Info(ctypes.Structure):
    _fields_ = [(n, ctypes.c_size_t) for n in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost")]

c = ctypes.CDLL(None)
c.mallinfo2.restype = Info
c.malloc.restype = ctypes.c_size_t
c.free.argtypes = [ctypes.c_void_p]

def taken():
    info = c.mallinfo2()
    return info.arena + info.hblkhd

script = json.load(sys.stdin)
# The holes that Python left are filled first: the model begins with none.
for size in (1 << n for n in range(20, 4, -1)):
    while True:
        had = taken()
        c.malloc(ctypes.c_size_t(size))
        if taken() != had:
            break
# Nothing of Python's own is allocated between the blocks.
blocks = [ctypes.c_void_p() for _ in range(1 + max(key for key, _ in script))]
where = [ctypes.byref(b) for b in blocks]
# The first block begins where the model's does: at a multiple of 64.
while (c.malloc(ctypes.c_size_t(40)) - 16 + 48) % 64:
    pass
before, peak = taken(), 0
for key, nbytes in script:
    if nbytes:
        assert not c.posix_memalign(where[key], ctypes.c_size_t(64), ctypes.c_size_t(nbytes))
    else:
        c.free(blocks[key])
    peak = max(peak, taken() - before)
print(peak)
"""


def steps_of_a_training(seed: int, steps: int = 3) -> Script:
    """Weights that stay; in each step activations that come in order and go in reverse order, with
    short-lived tensors between them."""
    rng = random.Random(seed)
    sizes = [rng.choice([64, 256, 1024, 2048, 8192]) * 1024 for _ in range(4)]
    sizes += [rng.randint(2000, 3 * MIB) for _ in range(3)]
    script: Script = []
    key = 0

    def take(nbytes: int) -> int:
        nonlocal key
        key += 1
        script.append((key, nbytes))
        return key

    for _ in range(20):
        take(rng.choice(sizes) // 4)
    for _ in range(steps):
        held = []
        for _ in range(40):
            short = [take(rng.choice(sizes)) for _ in range(rng.randint(0, 3))]
            held.append(take(rng.choice(sizes)))
            script.extend((s, 0) for s in short)
        for kept in reversed(held):
            short = [take(rng.choice(sizes)) for _ in range(rng.randint(0, 3))]
            script.append((kept, 0))
            script.extend((s, 0) for s in short)
    return script


def modelled(script: Script) -> int:
    heap = Heap()
    for key, nbytes in script:
        if nbytes:
            heap.take(key, nbytes)
        else:
            heap.drop(key)
    return heap.peak


GLIBC = tuple(map(int, platform.libc_ver()[1].split("."))) if platform.libc_ver()[1] else ()


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or GLIBC < (2, 33) or GLIBC == (2, 38),
    reason="no glibc, one without mallinfo2, or the one that looks for an aligned hole first",
)
@pytest.mark.parametrize("seed", range(6))
def test_it_takes_what_the_c_library_takes(seed: int) -> None:
    script = steps_of_a_training(seed)
    done = subprocess.run(
        [sys.executable, "-P", "-c", REAL], input=json.dumps(script), text=True, check=True,
        capture_output=True, env=environment(os.environ),
    )  # fmt: skip
    assert modelled(script) == pytest.approx(int(done.stdout), rel=0.01)


def test_what_is_free_at_the_top_goes_back_to_the_system() -> None:
    heap = Heap()
    for key in range(40):
        heap.take(key, 100 << 10)
    for key in range(40):
        heap.drop(key)
    assert heap.peak > 40 * (100 << 10)
    assert heap.now <= TOP_PAD + 4096


def test_the_hole_of_a_tensor_is_too_small_for_another_of_its_size() -> None:
    heap = Heap()
    for key in range(8):
        heap.take(key, 64 << 10)
    before = heap.peak
    for key in range(0, 8, 2):
        heap.drop(key)
    for key in range(10, 14):
        heap.take(key, 64 << 10)
    assert heap.peak >= before + 3 * (64 << 10)
    for key in range(10, 14):
        heap.drop(key)
    before = heap.peak
    for key in range(20, 24):
        heap.take(key, 60 << 10)  # but a smaller one fits
    assert heap.peak == before


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 3 * MIB)), max_size=60))
def test_it_never_takes_less_than_what_lives_and_gives_everything_back(
    asked: list[tuple[int, int]],
) -> None:
    heap, live = Heap(), dict[int, int]()
    for key, nbytes in asked:
        if key in live:
            heap.drop(key)
            del live[key]
        else:
            heap.take(key, nbytes)
            live[key] = nbytes
        assert heap.peak >= sum(live.values())
    for key in live:
        heap.drop(key)
    assert heap.now <= 2 * LAST_THRESHOLD + TOP_PAD
    assert heap.peak >= heap.now
