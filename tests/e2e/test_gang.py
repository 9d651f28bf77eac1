"""A training on two devices as a user has it: preempted, paused, killed, shut down."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmos.drivers.cpu import procfs
from llmos.kernel import protocol as p
from llmos.kernel.errors import LlmosError
from support.machine import TEXT
from support.real import Machine, is_stopped, machine, wait_until

# One core for each device, of those that this process may use.
CORES = sorted(os.sched_getaffinity(0))[:2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(len(CORES) < 2, reason="two devices need two cores"),
]

STEPS = 400
DEVICES = tuple(
    word for n, core in enumerate(CORES)
    for word in ("--device", f"cpu{n}:cores={core},memory=2GiB")
)  # fmt: skip

# Float32 sums in another order; measured is 2e-7.
CLOSE = 1e-4


@pytest.fixture(scope="module")
def m() -> Iterator[Machine]:
    with machine(*DEVICES) as made:
        (made.home / "text.txt").write_text(TEXT)
        assert made.end_of(pretrain(made, "tiny", 5, devices=1))["exit_status"] == 0
        yield made


def args_of(m: Machine, out: str, steps: int = STEPS, **more: Any) -> dict[str, Any]:
    return {"data": str(m.home / "text.txt"), "out": out, "steps": steps, "devices": 2,
            "width": 32, "layers": 1, "heads": 2, "context": 64, "batch": 2, "vocab_size": 300,
            "dtype": "float32", "dropout": 0.1, "threads": 1, **more}  # fmt: skip


def pretrain(m: Machine, out: str, steps: int = STEPS, restart: str = "no", **more: Any) -> int:
    return m.submit("pretrain", restart=restart, **args_of(m, out, steps, **more))


def pretrain_on(m: Machine, device: str, out: str, **more: Any) -> int:
    """A short training on one device that is named -> its pid."""
    args = args_of(m, out, **{"steps": 5, "devices": 1, **more})
    return int(m.ask(p.Submit("pretrain", args, device=device))["pid"])


def holders(m: Machine) -> list[list[int]]:
    """Who has each device, in the order of the devices."""
    return [d["running_pids"] for d in m.ask(p.Status())["devices"]]


def losses(m: Machine, pid: int) -> list[float]:
    """The loss of each training step."""
    metrics = [r["metrics"] for r in m.records(pid)]
    return [x["loss"] for x in metrics if "val_loss" not in x]


def weights(m: Machine, name: str) -> bytes:
    return (m.home / "models" / name / "model.safetensors").read_bytes()


def ranks(m: Machine, pid: int) -> list[int]:
    return procfs.children(m.worker_of(pid))


def test_a_gang_is_on_both_devices_and_measured_on_both(m: Machine) -> None:
    pid = pretrain(m, "both", 100_000)
    m.until_step(pid, 1)
    assert m.row(pid)["devices"] == 2
    assert holders(m) == [[pid], [pid]]
    assert {tuple(procfs.affinity(r)) for r in ranks(m, pid)} == {(c,) for c in CORES}
    m.ask(p.Kill(pid, 9))
    assert m.end_of(pid)["exit_status"] == 137


def test_two_devices_have_the_loss_curve_of_one_with_twice_the_batch(m: Machine) -> None:
    curve: dict[str, Any] = {"steps": 20, "dropout": 0.0, "lr": 3e-3}
    one = pretrain(m, "one", devices=1, batch=4, **curve)
    two = pretrain(m, "two", devices=2, batch=2, **curve)
    assert [m.end_of(pid)["exit_status"] for pid in (one, two)] == [0, 0]
    assert len(losses(m, two)) == 20
    assert losses(m, two) == pytest.approx(losses(m, one), rel=CLOSE)
    assert losses(m, two)[-1] < losses(m, two)[0]


def test_a_paused_gang_leaves_both_devices_to_others(m: Machine) -> None:
    pid = pretrain(m, "resting", 100_000)
    m.until_step(pid, 1)
    m.ask(p.Pause(pid))
    assert holders(m) == [[], []]
    assert all(map(is_stopped, ranks(m, pid)))
    others = [pretrain_on(m, f"cpu{n}", f"beside-{n}") for n in range(2)]
    assert [m.end_of(other)["exit_status"] for other in others] == [0, 0]
    assert m.row(pid)["state"] == "paused"
    paused_at = m.step(pid)
    m.ask(p.Resume(pid))
    m.until_step(pid, paused_at + 3)
    assert holders(m) == [[pid], [pid]]
    m.ask(p.Kill(pid, 9))


@pytest.mark.long
def test_whatever_is_done_to_a_gang_it_ends_with_the_same_bits(m: Machine) -> None:
    calm = pretrain(m, "calm", 2 * STEPS)
    assert m.end_of(calm)["exit_status"] == 0
    pid = pretrain(m, "stormy", 2 * STEPS, restart="on-failure")
    m.until_step(pid, 3)
    # Somebody wants to know something now, on one of its devices.
    answered = m.end_of(m.submit("infer", model="tiny", prompt="The", max_tokens=3))
    assert answered["exit_status"] == 0
    m.ask(p.Pause(pid))
    assert all(map(is_stopped, ranks(m, pid)))
    m.ask(p.Resume(pid))
    saved = m.ask(p.Checkpoint(pid))["step"]
    m.until_step(pid, saved + 3)
    rank = ranks(m, pid)[1]
    os.kill(rank, signal.SIGKILL)
    wait_until(lambda: m.row(pid)["restarts"] == 1, "the restart")
    wait_until(lambda: len(m.records(pid, "restored")) == 1, "the checkpoint to be loaded")
    # By its records: its row has the step from before the death until it reports again.
    told = len(m.records(pid))
    wait_until(lambda: len(m.records(pid)) > told + 3, "steps after the restart")
    m.ask(p.Pause(pid))  # so that it is in the middle when the machine goes down
    m.shutdown()
    m.boot()
    m.ask(p.Resume(pid))
    assert m.end_of(pid)["exit_status"] == 0
    assert weights(m, "stormy") == weights(m, "calm")
    # The runs must have met, and the machine must have gone down in the middle.
    assert m.row(pid)["preemptions"] >= 1
    assert len(m.records(pid, "restored")) == 2


@pytest.mark.long
def test_a_gang_outlives_the_kernel(m: Machine) -> None:
    calm = pretrain(m, "calmer", seed=1)
    assert m.end_of(calm)["exit_status"] == 0
    pid = pretrain(m, "orphan", seed=1)
    m.until_step(pid, 3)
    m.ask(p.Pause(pid))  # so that it cannot end while there is no kernel
    before = ranks(m, pid)
    m.kill_kernel()
    m.boot()
    wait_until(lambda: m.row(pid)["worker_id"], "the adoption")
    assert ranks(m, pid) == before
    m.ask(p.Resume(pid))
    assert m.end_of(pid)["exit_status"] == 0
    assert weights(m, "orphan") == weights(m, "calmer")
    assert m.records(pid, "restored") == []


def test_a_rank_that_is_killed_ends_its_process_with_a_reason(m: Machine) -> None:
    pid = pretrain(m, "never", 100_000)
    m.until_step(pid, 1)
    os.kill(ranks(m, pid)[1], signal.SIGKILL)
    ended = m.end_of(pid)
    assert ended["exit_status"] == 137
    assert ended["reason"] == "rank 1 was killed by SIGKILL"
    assert not Path(m.home / "models" / "never").exists()


@pytest.mark.parametrize("devices", [3, 0, -1])
def test_more_devices_than_there_are_or_none_are_refused_in_one_line(
    m: Machine, devices: int
) -> None:
    before = len(m.ask(p.Ps(all=True)))
    with pytest.raises(LlmosError) as caught:
        pretrain(m, "never", devices=devices)
    assert "devices" in caught.value.message
    assert "\n" not in caught.value.message
    assert len(m.ask(p.Ps(all=True))) == before


def test_several_devices_and_a_named_one_are_refused_in_one_line(m: Machine) -> None:
    before = len(m.ask(p.Ps(all=True)))
    with pytest.raises(LlmosError) as caught:
        pretrain_on(m, "cpu0", "never", devices=2)
    assert caught.value.message == "--devices 2 and --device cpu0 cannot be together"
    assert len(m.ask(p.Ps(all=True))) == before
