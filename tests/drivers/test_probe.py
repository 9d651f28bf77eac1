"""Which devices there are, and what is wrong with how one was written."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from llmos.drivers.cpu import cgroup, probe, procfs
from llmos.drivers.sim.driver import SimDriver
from llmos.kernel.errors import BadArgument

CORE = min(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("text", "cores"), [("0", (0,)), ("0-3", (0, 1, 2, 3)), ("0-1+4", (0, 1, 4)), ("2+2", (2,))]
)
def test_cores_are_read(text: str, cores: tuple[int, ...]) -> None:
    assert probe.parse_cores(text) == cores


@pytest.mark.parametrize("text", ["", "a", "0-", "0,1", "-1", "0+"])
def test_what_is_no_list_of_cores_is_said(text: str) -> None:
    with pytest.raises(BadArgument, match="is not a list of cores"):
        probe.parse_cores(text)


def test_without_a_configuration_there_is_one_device_of_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (device,) = probe.find([])
    memory = cgroup.read()
    assert device.info.name == "cpu0"
    assert device.info.lanes == len(os.sched_getaffinity(0)) == len(device.cores)
    assert device.info.capacity_bytes == memory.total_bytes
    assert 0 < memory.available_bytes <= memory.total_bytes


def test_a_device_is_what_its_line_says() -> None:
    (device,) = probe.find([f"cpu3:cores={CORE},memory=1GiB"])
    assert (device.info.name, device.info.lanes, device.cores) == ("cpu3", 1, (CORE,))
    assert device.info.capacity_bytes == 2**30


@pytest.mark.parametrize(
    ("specs", "says"),
    [
        (["gpu0"], "'gpu0' is not known here"),
        (["cpu"], "'cpu' is not known here"),
        (["cpu0:cores=4096"], "core 4096 is not available"),
        (["cpu0:speed=9"], "'speed=9' is not known"),
        (["cpu0:memory=much"], "'much' is not a size"),
        (["cpu0:memory=0"], "cpu0 has no memory"),
        (["cpu0:cores=1-0"], "is not a list of cores"),
        (["cpu0:memory=9999GiB"], "there are"),
        ([f"cpu0:cores={CORE}", f"cpu1:cores={CORE}"], f"core {CORE} is given to cpu0 and to cpu1"),
    ],
)
def test_an_impossible_device_is_refused_with_one_line(specs: list[str], says: str) -> None:
    with pytest.raises(BadArgument) as caught:
        probe.find(specs)
    assert says in caught.value.message
    assert "\n" not in caught.value.message


def test_simulated_devices_are_read_the_same_way() -> None:
    big, small = SimDriver(["sim0:memory=2GiB,lanes=4", "sim1"]).devices()
    assert (big.name, big.capacity_bytes, big.lanes) == ("sim0", 2 * 2**30, 4)
    assert small.name == "sim1"
    for wrong in ("sim0:lanes=0", "sim0:lanes=x", "sim0:cores=1", "sim0:memory"):
        with pytest.raises(BadArgument, match="is not known"):
            SimDriver([wrong])
    with pytest.raises(BadArgument, match="same name"):
        SimDriver(["sim0", "sim0"])


def child(code: str) -> subprocess.Popen[bytes]:
    made = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    )
    assert made.stdout is not None
    assert made.stdout.readline() == b"up\n"
    return made


def finish(made: subprocess.Popen[bytes]) -> None:
    made.kill()
    made.communicate()


def test_a_process_has_one_start_time_and_a_dead_one_none() -> None:
    made = child("print('up', flush=True); input()")
    began = procfs.started(made.pid)
    assert began > 0
    assert procfs.started(made.pid) == began
    assert procfs.started(os.getpid()) < began
    made.kill()
    os.waitid(os.P_PID, made.pid, os.WEXITED | os.WNOWAIT)
    assert procfs.started(made.pid) == -1.0, "a zombie is gone"
    made.communicate()
    assert procfs.started(made.pid) == -1.0
    assert procfs.stat(made.pid) is None


def test_a_process_is_stopped_when_all_its_threads_are() -> None:
    made = child(
        "import threading, time\n"
        "for _ in range(3): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "print('up', flush=True); input()"
    )
    assert not procfs.is_stopped(made.pid)
    os.kill(made.pid, 19)
    os.waitid(os.P_PID, made.pid, os.WSTOPPED | os.WNOWAIT)
    assert procfs.is_stopped(made.pid)
    os.kill(made.pid, 18)
    os.waitid(os.P_PID, made.pid, os.WCONTINUED | os.WNOWAIT)
    assert not procfs.is_stopped(made.pid)
    finish(made)
    assert procfs.is_stopped(made.pid), "who is gone does nothing"


def test_private_memory_is_what_a_process_has_written() -> None:
    made = child(
        "x = bytearray(64 << 20); x[::4096] = b'x' * (64 << 8); print('up', flush=True); input()"
    )
    plain = child("print('up', flush=True); input()")
    more = procfs.private_bytes(made.pid) - procfs.private_bytes(plain.pid)
    assert 64 << 20 <= more <= 72 << 20
    for process in (made, plain):
        finish(process)
    assert procfs.private_bytes(made.pid) == 0


def test_the_tree_of_a_process_has_its_grandchildren() -> None:
    made = child(
        "import subprocess, sys\n"
        "p = subprocess.Popen([sys.executable, '-c', 'print(\"in\", flush=True); input()'],\n"
        "                     stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "p.stdout.readline()\n"
        "print('up', flush=True); input()"
    )
    found = procfs.children(made.pid)
    assert found[0] == made.pid
    assert len(found) == 2
    made.communicate(b"\n")
    assert procfs.children(made.pid) == [made.pid]
