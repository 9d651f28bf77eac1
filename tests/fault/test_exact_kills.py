"""kill -9 of real workers, again and again: curve, weights and pictures as if nothing had been."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.real import Machine, machine, wait_until
from support.texts import story_file

pytestmark = [pytest.mark.fault, pytest.mark.long]

STEPS = 60
PRETRAIN = {
    "steps": STEPS, "width": 32, "layers": 2, "heads": 2, "vocab_size": 300, "context": 32,
    "batch": 2, "accumulate": 2, "dropout": 0.1, "eval_every": 20, "threads": 1,
}  # fmt: skip
GAN = {"steps": STEPS, "batch": 8, "latent": 8, "width": 8, "sample_every": 20, "threads": 1}


@pytest.fixture(scope="module")
def m() -> Iterator[Machine]:
    with machine("--device", "cpu0:memory=3GiB") as made:
        yield made


def curve(m: Machine, pid: int) -> dict[int, dict[str, float]]:
    """The metrics of each step as they were told last. Steps after a checkpoint come twice: they
    must have been the same both times."""
    found: dict[int, dict[str, float]] = {}
    for record in m.records(pid):
        metrics = {k: v for k, v in record["metrics"].items() if k != "tokens_per_s"}
        if any(k.startswith("val_") for k in metrics):
            continue  # slices of a validation end where the clock says
        assert found.setdefault(record["step"], metrics) == metrics, record["step"]
    return found


def evaluations(m: Machine, pid: int) -> dict[int, Any]:
    return {r["step"]: r["metrics"] for r in m.records(pid, "eval")}


def files(m: Machine, pid: int, out: str) -> dict[str, str]:
    found = {}
    for folder in (m.home / "models" / out, m.home / "procs" / str(pid) / "samples"):
        for path in folder.rglob("*"):
            if path.suffix in (".safetensors", ".png"):
                found[path.relative_to(folder).as_posix()] = hashlib.sha256(
                    path.read_bytes()
                ).hexdigest()
    return found


@pytest.mark.parametrize("program", ["pretrain", "gan"])
def test_workers_killed_again_and_again_come_to_the_same(
    m: Machine, tmp_path: Path, program: str
) -> None:
    if program == "pretrain":
        args: dict[str, Any] = {**PRETRAIN, "data": str(story_file(tmp_path / "t.txt", 60))}
    else:
        images = np.random.default_rng(0).integers(0, 255, (24, 12, 12), "u1")
        np.savez(tmp_path / "images.npz", images)
        args = {**GAN, "data": str(tmp_path / "images.npz")}
    calm = m.submit(program, **args, out=f"{program}-calm")
    assert m.end_of(calm)["exit_status"] == 0
    pid = m.submit(program, **args, out=f"{program}-killed", save_every=3, restart="on-failure")
    for kills, step in enumerate((5, 17, 33, 50), 1):
        m.until_step(pid, step)
        os.kill(m.worker_of(pid), signal.SIGKILL)
        wait_until(lambda n=kills: len(m.records(pid, "restored")) == n, "it to go on")  # type: ignore[misc]
    wait_until(lambda: len(curve(m, pid)) == STEPS, "the last step")
    wait_until(lambda: (m.home / "models" / f"{program}-killed").is_dir(), "the model")
    assert curve(m, pid) == curve(m, calm)
    assert evaluations(m, pid) == evaluations(m, calm)
    assert files(m, pid, f"{program}-killed") == files(m, calm, f"{program}-calm")
    assert not [r for r in m.records(pid, "note") if "damaged" in r["text"]]
