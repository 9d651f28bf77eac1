"""One suite for all drivers: what each promises the kernel."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmos.drivers.base import WorkerHeld
from llmos.drivers.conformance import CHECKS, check_driver
from llmos.drivers.cpu.driver import CpuDriver
from llmos.drivers.sim.driver import SimDriver
from support.live import short_home

SPIN = "llmos.services.programs.spin:Spin"


@pytest.fixture
def home() -> Iterator[Path]:
    path = short_home()
    yield path
    shutil.rmtree(path)


def test_the_simulated_driver_conforms(home: Path) -> None:
    checked = asyncio.run(check_driver(SimDriver(["sim0:memory=1GiB"]), home, entry=SPIN))
    assert checked == [c.__name__ for c in CHECKS]


@pytest.mark.slow
@pytest.mark.long
def test_the_cpu_driver_conforms(home: Path) -> None:
    checked = asyncio.run(check_driver(CpuDriver([]), home, entry=SPIN))
    assert checked == [c.__name__ for c in CHECKS]


def test_a_driver_that_breaks_its_promise_is_found_out(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmos.drivers.conformance.QUIET_S", 0.02)

    class Careless(SimDriver):
        def hold(self, worker_id: str) -> None:
            """Says that it held the worker, and lets it work on."""
            self._loop.call_soon(self._tell, WorkerHeld(worker_id))

    with pytest.raises(AssertionError, match="a held worker"):
        asyncio.run(check_driver(Careless([]), home, entry=SPIN))
