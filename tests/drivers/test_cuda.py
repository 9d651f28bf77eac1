"""The CUDA driver without a GPU: probing, books, holds by message."""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmos.drivers import conformance
from llmos.drivers.base import WorkerSpec
from llmos.drivers.conformance import CHECKS, check_driver
from llmos.drivers.cuda import probe
from llmos.drivers.cuda.books import CONTEXT_BYTES, Books, Holder
from llmos.drivers.cuda.driver import CudaDriver
from llmos.drivers.cuda.nvml import Nvml, Usage
from llmos.drivers.forked import ForkedWorker
from llmos.kernel.errors import BadArgument, NoSuchThing
from support.fake_gpus import GIB, FakeGpus, driver_without_gpu
from support.live import short_home

SPIN = "llmos.services.programs.spin:Spin"
MIB = 2**20


@pytest.fixture
def home() -> Iterator[Path]:
    path = short_home()
    yield path
    shutil.rmtree(path)


@pytest.fixture(autouse=True)
def all_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


# ---- which devices there are ----


def test_every_visible_gpu_is_a_device() -> None:
    first, second = (d.info for d in probe.find([], FakeGpus(2)))
    assert (first.name, second.name) == ("cuda0", "cuda1")
    assert (first.capacity_bytes, first.torch_device, first.moves_to) == (
        16 * GIB,
        "cuda:0",
        "host",
    )
    assert first.why == "Fake, driver 1.0; memory: total less 512 MiB reserved"


def test_memory_can_be_configured() -> None:
    (found,) = probe.find(["cuda1:memory=10GiB"], FakeGpus(2))
    assert (found.info.name, found.info.capacity_bytes) == ("cuda1", 10 * GIB)
    assert found.gpu.uuid == "GPU-1"
    assert found.info.why.endswith("configured")


@pytest.mark.parametrize(
    ("shown", "uuids"),
    [
        ("1", ["GPU-1"]),
        ("2, 0", ["GPU-2", "GPU-0"]),
        ("GPU-2,GPU-1", ["GPU-2", "GPU-1"]),
        ("0,7,1", ["GPU-0"]),  # as CUDA: what it cannot read ends the list
    ],
)
def test_cuda_visible_devices_says_which_and_in_which_order(
    monkeypatch: pytest.MonkeyPatch, shown: str, uuids: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert [d.gpu.uuid for d in probe.find([], FakeGpus(3))] == uuids


@pytest.mark.parametrize("shown", ["", "-1", "9"])
def test_when_all_are_hidden_there_is_none(monkeypatch: pytest.MonkeyPatch, shown: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    with pytest.raises(NoSuchThing, match="no CUDA device"):
        probe.find(["cuda0"], FakeGpus(3))


@pytest.mark.parametrize(
    ("specs", "text"),
    [
        (["cuda5"], "there is no cuda5"),
        (["cuda"], "'cuda' is not known"),
        (["cuda0:memory=17GiB"], "cuda0 asks for 17.0 GiB; the GPU has 16.0 GiB"),
        (["cuda0:memory=0"], "cuda0 asks for 0.0 GiB"),
        (["cuda0:memory=big"], "'big' is not a size"),
        (["cuda0:lanes=2"], "'lanes=2' is not known"),
        (["cuda0", "cuda0:memory=1GiB"], "two devices have the same name"),
    ],
)
def test_an_impossible_device_is_refused_in_one_line(specs: list[str], text: str) -> None:
    with pytest.raises(BadArgument, match=text) as raised:
        probe.find(specs, FakeGpus())
    assert "\n" not in raised.value.message
    assert raised.value.hint


def test_without_nvidia_ml_py_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(NoSuchThing, match="nvidia-ml-py") as raised:
        CudaDriver([])
    assert "llmos[cuda]" in raised.value.hint


def test_without_a_gpu_it_says_so_in_one_line() -> None:
    pytest.importorskip("pynvml")
    try:
        Nvml().close()
    except NoSuchThing as exc:
        assert exc.message.startswith("no CUDA device can be used here")  # noqa: PT017
    else:
        pytest.skip("there is a GPU here")


# ---- the books ----


def test_the_list_of_processes_is_believed_where_it_names_ours() -> None:
    books = Books()
    usage = Usage(5 * GIB, {10: 2 * GIB, 11: GIB, 99: 2 * GIB})
    holders = {"a": Holder([10, 12], 100), "b": Holder([11])}
    assert books.split(usage, holders) == {"a": 2 * GIB, "b": GIB}


@pytest.mark.parametrize("by_pid", [{}, {4321: GIB}, {10: None}])
def test_elsewhere_what_a_worker_says_is_taken_and_its_context_added(
    by_pid: dict[int, int | None],
) -> None:
    holders = {"a": Holder([10], GIB), "b": Holder([11], 2 * GIB), "c": Holder([12])}
    found = Books().split(Usage(6 * GIB, by_pid), holders)
    assert found == {"a": GIB + CONTEXT_BYTES, "b": 2 * GIB + CONTEXT_BYTES, "c": 0}


def test_the_size_of_a_context_is_learned_from_a_worker_that_is_alone() -> None:
    books = Books()
    books.split(Usage(GIB, {}), {"a": Holder([10])})  # somebody else has a GiB
    found = books.split(Usage(3 * GIB + 450 * MIB, {}), {"a": Holder([10], 2 * GIB)})
    assert books.context_bytes == 450 * MIB
    assert found == {"a": 2 * GIB + 450 * MIB}
    # A neighbour that came meanwhile is not taken for a part of it.
    books.split(Usage(4 * GIB, {}), {"a": Holder([10], 2 * GIB)})
    assert books.context_bytes == 450 * MIB


def test_a_context_cannot_have_any_size() -> None:
    books = Books()
    books.split(Usage(9 * GIB, {10: 8 * GIB}), {"a": Holder([10], GIB)})
    assert books.context_bytes == CONTEXT_BYTES


# ---- the whole contract, with the CPU in the device's place ----


@pytest.mark.slow
@pytest.mark.parametrize("lists", [True, False], ids=["pids listed", "pids hidden"])
@pytest.mark.long
def test_it_conforms_with_workers_that_are_held_by_message(home: Path, lists: bool) -> None:
    gpus = FakeGpus(lists=lists)
    # Limits, and a worker's own figure, come from torch's allocator on a GPU.
    needs_a_gpu = {"a_promise_is_a_wall"} | (
        set() if lists else {"memory_is_measured_and_comes_back"}
    )
    checks = tuple(c for c in CHECKS if c.__name__ not in needs_a_gpu)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conformance, "CHECKS", checks)
        driver = driver_without_gpu(gpus)
        assert len(asyncio.run(check_driver(driver, home, entry=SPIN))) == len(checks)
    assert gpus.closed
    holds = driver.statistics()["holds"]
    assert holds["count"] >= 2
    assert 0 <= holds["p50_ms"] <= holds["p99_ms"] <= holds["max_ms"]


class Line:
    """A driver with one worker that does not exist; what it is sent and what is told."""

    def __init__(self, tmp_path: Path) -> None:
        self.driver = driver_without_gpu(FakeGpus())
        self.sent: list[dict[str, Any]] = []
        self.told: list[Any] = []
        spec = WorkerSpec("w1-1", "cuda0", tmp_path, tmp_path / "log", tmp_path)
        self.worker = ForkedWorker(spec, "", os_pid=1)
        self.driver._workers["w1-1"] = self.worker
        self.driver._tell = self.told.append
        self.driver.send = lambda _, m: self.sent.append(m)  # type: ignore[method-assign,assignment]

    def says(self, **message: Any) -> None:
        self.driver._said(self.worker, message)

    def names(self) -> list[str]:
        return [type(e).__name__ for e in self.told]


def in_loop(test: Callable[[Line], None], tmp_path: Path) -> None:
    async def go() -> None:
        line = Line(tmp_path)
        line.driver._loop = asyncio.get_running_loop()
        test(line)

    asyncio.run(go())


def test_an_answer_to_a_hold_that_was_taken_back_is_no_answer_to_the_next(tmp_path: Path) -> None:
    def test(line: Line) -> None:
        line.driver.hold("w1-1")
        line.driver.grant("w1-1", 2)
        line.driver.hold("w1-1")
        line.says(k="held", n=1, took_s=0.01, longest_s=0.0)
        assert line.names() == []
        line.says(k="held", n=2, took_s=0.01, longest_s=0.004)
        assert line.names() == ["WorkerHeld"]
        line.says(k="held", n=2, took_s=0.01, longest_s=0.0)
        assert line.names() == ["WorkerHeld"]
        assert [m["k"] for m in line.sent] == ["hold", "lease", "hold"]

    in_loop(test, tmp_path)


def test_an_order_that_a_broken_line_may_have_lost_is_given_again(tmp_path: Path) -> None:
    def test(line: Line) -> None:
        line.driver.hold("w1-1")
        line.says(k="hello", loaded=True, step=1)
        assert [m["k"] for m in line.sent] == ["hold", "hold"]
        line.says(k="held", n=1, took_s=0.01, longest_s=0.0)
        assert line.names() == ["WorkerCame", "WorkerHeld"]

    in_loop(test, tmp_path)


def test_a_limit_leaves_room_for_the_context(tmp_path: Path) -> None:
    def test(line: Line) -> None:
        line.driver.limit("w1-1", 2 * GIB)
        (order,) = line.sent
        assert order["promised_bytes"] == 2 * GIB
        assert order["own_bytes"] == 2 * GIB - CONTEXT_BYTES
        line.driver.limit("w1-1", 1)
        assert line.sent[-1]["own_bytes"] == 64 * MIB

    in_loop(test, tmp_path)


def test_a_worker_sees_its_own_gpu_alone(tmp_path: Path) -> None:
    driver = driver_without_gpu(FakeGpus(2))
    spec = WorkerSpec("w", "cuda1", tmp_path, tmp_path, tmp_path, env={"A": "b"})
    assert driver._place(spec)["env"] == {"A": "b", "CUDA_VISIBLE_DEVICES": "GPU-1"}
    both = WorkerSpec("w", "cuda0", tmp_path, tmp_path, tmp_path, devices=("cuda0", "cuda1"))
    assert driver._place(both)["env"]["CUDA_VISIBLE_DEVICES"] == "GPU-0,GPU-1"
    assert len(driver._place(both)["ranks"]) == 2
