"""The wall that a promise becomes: what a process may have, and what it gets when it wants more."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.drivers.cpu import procfs
from llmos.drivers.cpu.walls import LOADING, MIB, Wall, measure
from support.children import child, until

# Takes what each line of input says (in MiB, touched), and says what came of it.
TAKER = """
import sys
held = []
print('up', flush=True)
for line in sys.stdin:
    try:
        held.append(bytearray(int(line) << 20)); print('got', flush=True)
    except MemoryError:
        print('refused', flush=True)
"""


def take(made: subprocess.Popen[bytes], mib: int) -> str:
    assert made.stdin is not None
    assert made.stdout is not None
    made.stdin.write(f"{mib}\n".encode())
    made.stdin.flush()
    return made.stdout.readline().decode().strip()


def stand(wall: Wall, os_pid: int, loading: bool = False) -> None:
    wall.stand_on(measure(procfs.children(os_pid)), loading)


def soft(os_pid: int) -> int:
    return resource.prlimit(os_pid, resource.RLIMIT_DATA)[0]


def test_who_wants_more_than_was_promised_gets_a_clean_error_and_goes_on() -> None:
    with child(TAKER) as made:
        wall = Wall(slack=16 * MIB, promised=100 * MIB)
        stand(wall, made.pid)
        assert take(made, 80) == "got"
        assert take(made, 80) == "refused"
        assert take(made, 8) == "got", "it lives, and what is left it may have"


def test_at_each_measurement_what_is_left_is_worked_out_anew() -> None:
    with child(TAKER) as made:
        wall = Wall(slack=16 * MIB, promised=200 * MIB)
        stand(wall, made.pid)
        first = soft(made.pid)
        assert take(made, 100) == "got"
        stand(wall, made.pid)
        # What it has is in its data now, and no more of what is left for it.
        assert abs(soft(made.pid) - first) < 8 * MIB
        assert take(made, 120) == "refused"
        wall.promised = 400 * MIB
        wall.raise_up()
        assert take(made, 120) == "got"


def test_memory_that_is_reserved_and_untouched_is_not_counted_against_the_promise() -> None:
    reserve = "import mmap; m = mmap.mmap(-1, 500 << 20, mmap.MAP_PRIVATE)\n"
    with child(reserve + TAKER) as made:
        wall = Wall(slack=16 * MIB, promised=100 * MIB)
        stand(wall, made.pid)
        assert take(made, 80) == "got"
        assert take(made, 80) == "refused"


def test_a_tree_shares_what_is_left_and_a_new_child_inherits_the_limit() -> None:
    fork = "import os, signal\nif not os.fork(): held = bytearray(60 << 20); signal.pause()\n"
    with child(fork + TAKER) as made:
        until(lambda: len(procfs.children(made.pid)) == 2, "the child")
        other = procfs.children(made.pid)[1]
        until(lambda: procfs.private_bytes(other) >= 60 * MIB, "its memory")
        wall = Wall(slack=8 * MIB, promised=100 * MIB)
        stand(wall, made.pid)
        assert set(wall.limits()) == {made.pid, other}
        assert take(made, 60) == "refused", "the other has 60 of the 100"
        os.kill(other, 9)
        until(lambda: procfs.started(other) < 0, "its end")
        stand(wall, made.pid)
        assert take(made, 60) == "got"


def test_the_hard_limit_stays_so_that_anybody_can_raise_the_soft_one_again() -> None:
    with child(TAKER) as made:
        _, hard = resource.prlimit(made.pid, resource.RLIMIT_DATA)
        wall = Wall(slack=0, promised=MIB)
        stand(wall, made.pid)
        assert resource.prlimit(made.pid, resource.RLIMIT_DATA)[1] == hard
        assert soft(made.pid) < 2**40


def test_a_hard_limit_of_somebody_else_is_not_passed() -> None:
    with child(TAKER) as made:
        resource.prlimit(made.pid, resource.RLIMIT_DATA, (50 * MIB, 50 * MIB))
        wall = Wall(slack=0, promised=1000 * MIB)
        stand(wall, made.pid)
        assert resource.prlimit(made.pid, resource.RLIMIT_DATA) == (50 * MIB, 50 * MIB)


def test_who_is_gone_is_no_error() -> None:
    with child(TAKER) as made:
        wall = Wall(slack=0, promised=MIB)
        stand(wall, made.pid)
        made.kill()
        made.wait()
        wall.raise_up()
        assert measure([made.pid]).data == {}


def test_without_a_promise_there_is_no_wall() -> None:
    with child(TAKER) as made:
        before = soft(made.pid)
        stand(Wall(slack=0), made.pid)
        assert soft(made.pid) == before


def test_it_costs_microseconds() -> None:
    with child(TAKER) as made:
        wall = Wall(slack=0, promised=1000 * MIB)
        stand(wall, made.pid)
        began = time.perf_counter()
        for _ in range(1000):
            wall.raise_up()
        assert (time.perf_counter() - began) / 1000 < 0.001


@given(
    promised=st.integers(0, 2**45), private=st.integers(0, 2**45), slack=st.integers(0, 2**30),
    data=st.integers(0, 1 << 45), loading=st.booleans(),
)  # fmt: skip
def test_a_process_may_always_grow_by_what_is_left_and_the_slack_and_no_more(
    promised: int, private: int, slack: int, data: int, loading: bool
) -> None:
    wall = Wall(slack, promised, loading, {7: data}, private)
    (limit,) = wall.limits().values()
    grows = limit - data
    assert slack <= grows <= LOADING * promised + slack
    if not loading and private <= promised:
        assert private + grows == promised + slack


@pytest.mark.slow
def test_a_worker_is_ended_before_the_kernel_when_the_machine_has_no_memory() -> None:
    code = (
        "from llmos.drivers.worker.zygote import leave_session\n"
        "leave_session()\n"
        "import os, sys\n"
        "sys.exit(int(open('/proc/self/oom_score_adj').read()) // 10)"
    )
    ours = int(Path("/proc/self/oom_score_adj").read_text())
    ended = subprocess.run([sys.executable, "-P", "-c", code], check=False)
    assert ended.returncode == min(1000, ours + 500) // 10
