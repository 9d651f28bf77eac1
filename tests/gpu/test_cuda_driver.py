"""On a machine with a CUDA device: pytest -m gpu. Figures come from tests/bench/bench_gpu.py."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
import torch

from llmos.drivers.conformance import CHECKS, check_driver
from llmos.drivers.cuda.driver import CudaDriver
from llmos.drivers.worker.mover import Mover
from support.live import short_home

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_the_cuda_driver_conforms() -> None:
    pytest.importorskip("pynvml")
    home = short_home()
    try:
        driver = CudaDriver(["cuda0"])
        entry = "llmos.services.programs.spin:Spin"
        assert len(asyncio.run(check_driver(driver, home, entry=entry))) == len(CHECKS)
    finally:
        shutil.rmtree(home)


@pytest.mark.parametrize("way", [["host"], ["disk"], ["host", "disk"]])
def test_device_memory_moves_out_and_comes_back(tmp_path: Path, way: list[str]) -> None:
    from llmos.drivers.worker.lanes import CudaLane

    tensors = [torch.randn(5_000_000, device="cuda:0"), torch.arange(77, device="cuda:0")]
    tensors.append(tensors[0][::2])
    before = [t.cpu() for t in tensors]
    mover = Mover(CudaLane("cuda:0"), tmp_path, 2**20)
    for where in way:
        mover.out(tensors, where)
        assert torch.cuda.memory_allocated() < 10_000_000
    mover.back()
    assert all(torch.equal(a, t.cpu()) for a, t in zip(before, tensors, strict=True))
