"""How much memory there is, on machines that are folders: a /proc and a /sys of each kind."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from llmos.drivers.cpu import cgroup, probe
from llmos.kernel.errors import BadArgument

GIB = 2**30
V2 = "25 20 0:23 {root} {at} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "36 31 0:33 {root} {at} rw,relatime - cgroup cgroup rw,memory"
V1_CPU = "32 31 0:30 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu"
V2_TOP, V1_TOP = "/sys/fs/cgroup", "/sys/fs/cgroup/memory"


class Machine:
    """A root folder with what the probe reads. 16 GiB, of which 12 are available."""

    def __init__(self, root: Path, membership: str = "", mounts: str = "") -> None:
        self.root = root
        self._write(
            "proc/meminfo", f"MemTotal: {16 * GIB // 1024} kB\nMemFree: 1 kB\n"
            f"MemAvailable: {12 * GIB // 1024} kB\nHugePages_Total: 0\n",
        )  # fmt: skip
        if membership:
            self._write("proc/self/cgroup", membership + "\n")
            self._write("proc/self/mountinfo", "14 1 8:1 / / rw - ext4 /dev/root rw\n" + mounts)

    def v2(self, group: str, limit: str, used: int = 0, inactive: int = 0) -> None:
        self._write(f"sys/fs/cgroup/{group}/memory.max", f"{limit}\n")
        self._write(f"sys/fs/cgroup/{group}/memory.current", f"{used}\n")
        self._write(
            f"sys/fs/cgroup/{group}/memory.stat", f"anon 1\nfile 2\ninactive_file {inactive}\n"
        )

    def v1(self, group: str, limit: int, used: int = 0, inactive: int = 0) -> None:
        at = f"sys/fs/cgroup/memory/{group}"
        self._write(f"{at}/memory.limit_in_bytes", f"{limit}\n")
        self._write(f"{at}/memory.usage_in_bytes", f"{used}\n")
        self._write(f"{at}/memory.stat", f"inactive_file 0\ntotal_inactive_file {inactive}\n")

    def read(self) -> cgroup.Memory:
        return cgroup.read(self.root)

    def _write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_without_cgroups_it_is_the_machines(tmp_path: Path) -> None:
    assert Machine(tmp_path).read() == cgroup.Memory(16 * GIB, 12 * GIB, "MemTotal")


def test_the_limit_of_our_own_group_counts(tmp_path: Path) -> None:
    m = Machine(tmp_path, "0::/job", V2.format(root="/", at=V2_TOP))
    m.v2("job", str(4 * GIB), used=3 * GIB, inactive=2 * GIB)
    assert m.read() == cgroup.Memory(
        4 * GIB, 3 * GIB, "cgroup limit (/sys/fs/cgroup/job/memory.max)"
    )


def test_the_limit_of_an_ancestor_counts_and_the_tightest_wins(tmp_path: Path) -> None:
    m = Machine(tmp_path, "0::/user/session/job", V2.format(root="/", at=V2_TOP))
    m.v2("user/session/job", "max", used=GIB)
    m.v2("user/session", str(8 * GIB), used=GIB)
    m.v2("user", str(2 * GIB), used=GIB // 2)
    found = m.read()
    assert (found.total_bytes, found.available_bytes) == (2 * GIB, 3 * GIB // 2)
    assert found.why == "cgroup limit (/sys/fs/cgroup/user/memory.max)"


def test_a_wide_ancestor_that_others_have_filled_leaves_less(tmp_path: Path) -> None:
    m = Machine(tmp_path, "0::/user/job", V2.format(root="/", at=V2_TOP))
    m.v2("user/job", str(4 * GIB), used=0)
    m.v2("user", str(8 * GIB), used=15 * GIB // 2)
    assert (m.read().total_bytes, m.read().available_bytes) == (4 * GIB, GIB // 2)


def test_a_limit_above_the_machine_is_none(tmp_path: Path) -> None:
    m = Machine(tmp_path, "0::/job", V2.format(root="/", at=V2_TOP))
    m.v2("job", str(64 * GIB), used=GIB)
    assert m.read() == cgroup.Memory(16 * GIB, 12 * GIB, "MemTotal")


def test_a_container_with_its_own_view_of_v2(tmp_path: Path) -> None:
    """Its group is the root of what is mounted, and is called "/"."""
    m = Machine(tmp_path, "0::/", V2.format(root="/", at=V2_TOP))
    m.v2(".", str(GIB))
    assert m.read().total_bytes == GIB


def test_a_container_of_v1_sees_its_group_mounted_as_the_top(tmp_path: Path) -> None:
    mount = V1.format(root="/docker/abc", at=V1_TOP)
    m = Machine(tmp_path, "4:memory:/docker/abc\n1:cpu:/x\n0::/", f"{V1_CPU}\n{mount}")
    m.v1(".", 3 * GIB, used=GIB, inactive=GIB // 2)
    assert m.read() == cgroup.Memory(
        3 * GIB, 5 * GIB // 2, "cgroup limit (/sys/fs/cgroup/memory/memory.limit_in_bytes)"
    )


def test_nested_v1_without_a_limit_of_its_own(tmp_path: Path) -> None:
    m = Machine(tmp_path, "4:cpu,memory:/a/b", V1.format(root="/", at=V1_TOP))
    m.v1("a/b", 9223372036854771712)
    m.v1("a", 6 * GIB)
    m.v1(".", 9223372036854771712)
    assert m.read().total_bytes == 6 * GIB


def test_a_group_outside_of_what_is_mounted_tells_nothing(tmp_path: Path) -> None:
    m = Machine(tmp_path, "0::/../elsewhere", V2.format(root="/", at=V2_TOP))
    m.v2("../elsewhere", str(GIB))
    m.v2(".", str(2 * GIB))
    assert m.read().total_bytes == 16 * GIB


@pytest.mark.parametrize("text", ["", "lots", "-1"])
def test_a_limit_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    m = Machine(tmp_path, "0::/job", V2.format(root="/", at=V2_TOP))
    m.v2("job", text)
    assert m.read().total_bytes == 16 * GIB


def test_a_device_says_where_its_memory_comes_from(tmp_path: Path) -> None:
    m = Machine(tmp_path, "0::/job", V2.format(root="/", at=V2_TOP))
    m.v2("job", str(4 * GIB))
    (found,) = probe.find([], tmp_path)
    cores = probe.show_cores(sorted(os.sched_getaffinity(0)))
    limit = "cgroup limit (/sys/fs/cgroup/job/memory.max)"
    assert found.info.capacity_bytes == 4 * GIB
    assert found.info.why == f"cores {cores}: affinity; memory: {limit}"
    core = cores.split("-")[0]
    (given,) = probe.find([f"cpu0:cores={core},memory=1GiB"], tmp_path)
    assert given.info.why == f"cores {core}: as given; memory: as given"
    with pytest.raises(BadArgument, match=r"there are 4\.0 GiB \(cgroup limit"):
        probe.find(["cpu0:memory=5GiB"], tmp_path)


def test_this_machine_can_be_read_fast_enough_for_every_second() -> None:
    began = time.perf_counter()
    for _ in range(20):
        found = cgroup.read()
    assert 0 < found.available_bytes <= found.total_bytes
    assert (time.perf_counter() - began) / 20 < 0.05
