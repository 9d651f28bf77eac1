"""Trainings on two devices: real ranks on two CPU devices, against one rank with all examples."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmos.drivers.cpu import procfs
from support.gang import Floor, Seen
from support.texts import story_file, toy_model

pytestmark = pytest.mark.slow

PRETRAIN = "llmos.services.programs.pretrain:Pretrain"
FINETUNE = "llmos.services.programs.finetune:Finetune"
FAILING, WAITING = "support.ranked:Failing", "support.ranked:Waiting"

ONE, TWO = ("cpu0",), ("cpu0", "cpu1")

# Float32 sums in another order: the issue asks for 1e-4, measured is 2e-7.
CLOSE = 1e-5

SMALL: dict[str, Any] = {
    "width": 32,
    "layers": 2,
    "heads": 2,
    "vocab_size": 300,
    "context": 16,
    "steps": 8,
    "dtype": "float32",
    "eval_every": 4,
    "overwrite": True,
}


@pytest.fixture(scope="module")
def floor() -> Iterator[Floor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))  # for support.ranked
        made = Floor("cpu0:cores=0,memory=2GiB", "cpu1:cores=1,memory=2GiB")
        yield made
        made.close()


@pytest.fixture(scope="module")
def text(floor: Floor) -> str:
    return str(story_file(floor.home / "text.txt", 150))


@pytest.fixture(scope="module")
def pairs(floor: Floor) -> str:
    """Answers of very different lengths: ranks differ in how many labels they have."""
    file = floor.home / "pairs.jsonl"
    rows = [
        {"prompt": f"count to {i}", "answer": " ".join("abc"[: i % 7] or "-")} for i in range(60)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def check_parity(floor: Floor, entry: str, batch: int, **args: Any) -> None:
    """One rank with a batch against two ranks with half of it each."""
    one = floor.start(entry, ONE, {**args, "batch": batch, "out": "one"})
    floor.to_end(one)
    two = floor.start(entry, TWO, {**args, "batch": batch // 2, "devices": 2, "out": "two"})
    floor.to_end(two)
    assert (one.status, two.status) == (0, 0), (one.said, two.said)
    assert len(two.losses) == args["steps"]
    assert two.losses == pytest.approx(one.losses, rel=CLOSE)
    assert two.losses[-1] < two.losses[0]
    assert two.done["result"]["loss"] == pytest.approx(one.done["result"]["loss"], rel=CLOSE)


@pytest.mark.parametrize(("arch", "accumulate"), [("transformer", 1), ("lstm", 2)])
@pytest.mark.long
def test_two_ranks_have_the_loss_curve_of_one(
    floor: Floor, text: str, arch: str, accumulate: int
) -> None:
    args = {**SMALL, "data": text, "arch": arch, "accumulate": accumulate}
    check_parity(floor, PRETRAIN, 16, **args)


@pytest.mark.long
@pytest.mark.parametrize("method", ["full", "lora"])
def test_ranks_with_few_and_with_many_labels_count_each_label_once(
    floor: Floor, pairs: str, method: str
) -> None:
    model = toy_model(floor.home / "base" / method, "transformer")
    args = {"model": str(model), "data": pairs, "method": method, "context": 64, "steps": 8,
            "dtype": "float32", "lr": 5e-3, "val_fraction": 0.2, "overwrite": True}  # fmt: skip
    check_parity(floor, FINETUNE, 4, accumulate=2, **args)


def test_a_gang_that_is_killed_goes_on_to_the_same_bits(floor: Floor, text: str) -> None:
    """With dropout: each rank must find its own random generators again."""
    args = {**SMALL, "data": text, "batch": 4, "devices": 2, "dropout": 0.2, "save_every": 3}
    whole = floor.to_end(floor.start(PRETRAIN, TWO, {**args, "out": "whole"}))
    first = floor.start(PRETRAIN, TWO, {**args, "out": "broken", "steps": 8})
    floor.until(lambda: bool(first.of_kind("checkpointed")))
    os.kill(first.os_pid, signal.SIGKILL)
    floor.to_end(first)
    second = floor.start(PRETRAIN, TWO, {**args, "out": "broken"}, work=first.worker_id)
    floor.to_end(second)
    saved = 8 - len(second.losses)
    assert saved in (3, 6)
    assert second.losses == whole.losses[saved:]
    weights = [floor.home / "models" / m / "model.safetensors" for m in ("whole", "broken")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.long
def test_all_ranks_take_a_smaller_micro_batch_at_the_same_step(floor: Floor, text: str) -> None:
    """If one did alone the others would wait for it in another place, for ever."""
    args = {**SMALL, "data": text, "batch": 4, "devices": 2, "steps": 250, "may_shrink": True,
            "eval_every": 0}  # fmt: skip
    seen = floor.start(PRETRAIN, TWO, {**args, "out": "shrunk"})
    floor.until(lambda: seen.step >= 2)
    floor.driver.send(seen.worker_id, {"k": "shrink", "level": "batch"})
    assert floor.to_end(seen).status == 0
    (shrunk,) = seen.of_kind("shrunk")
    assert (shrunk["level"], shrunk["shrank"]) == ("batch", True)
    ((step, size),) = [tuple(s.values()) for s in seen.done["result"]["shrunk"]]
    assert 2 <= step < 250
    assert size == 2
    whole = floor.to_end(floor.start(PRETRAIN, TWO, {**args, "out": "whole"}))
    assert seen.losses == pytest.approx(whole.losses, rel=1e-4)


def test_every_rank_draws_its_own_dropout(floor: Floor, text: str) -> None:
    args = {**SMALL, "data": text, "batch": 4, "devices": 2, "dropout": 0.2, "save_every": 3}
    seen = floor.to_end(floor.start(PRETRAIN, TWO, {**args, "out": "dropped"}))
    folder = Path(seen.of_kind("checkpointed")[0]["folder"])
    states = [folder / name for name in ("random.safetensors", "random-1.safetensors")]
    assert states[0].read_bytes() != states[1].read_bytes()


def test_ranks_with_clocks_of_their_own_end_at_the_same_step(floor: Floor, text: str) -> None:
    args = {**SMALL, "data": text, "batch": 4, "devices": 2, "out": "timed", "eval_every": 0}
    seen = floor.start(PRETRAIN, TWO, {**args, "steps": 1_000_000, "time_limit_s": 0.3})
    assert floor.to_end(seen).status == 0
    assert 1 < seen.step < 1_000_000


def test_ranks_run_where_they_belong_and_are_measured_there(floor: Floor) -> None:
    seen = floor.start(WAITING, TWO, {"steps": 1_000_000})
    floor.until(lambda: seen.step > 0)
    ranks = seen.ranks()
    assert [procfs.affinity(p) for p in ranks] == [{0}, {1}]
    assert len({os.getsid(p) for p in ranks}) == 1
    os.killpg(seen.os_pid, signal.SIGSTOP)
    mine = [floor.measured(d, seen) for d in TWO]
    assert mine == [procfs.private_bytes(p) for p in ranks]
    assert min(mine) > 1 << 20
    end(floor, seen)


def test_a_hold_stops_all_ranks_and_a_grant_lets_them_go_on(floor: Floor) -> None:
    seen = floor.start(WAITING, TWO, {"steps": 3000})
    for _ in range(10):
        before = seen.step
        floor.until(lambda: seen.step > before)  # noqa: B023  (called before it changes)
        held = seen.held
        floor.driver.hold(seen.worker_id)
        floor.until(lambda: seen.held > held)  # noqa: B023
        floor.until(lambda: all(map(procfs.is_stopped, seen.ranks())))
        floor.driver.grant(seen.worker_id, 2)
    assert floor.to_end(seen).status == 0
    assert [m["metrics"]["met"] for m in seen.of_kind("report")] == [2.0] * 3000


def test_a_rank_that_is_late_is_waited_for_longer_than_any_limit(floor: Floor) -> None:
    """Of two gangs one rank each is stopped. The one with a limit fails, ours goes on."""
    hasty = floor.start(WAITING, TWO, {"steps": 1_000_000, "limit_s": 0.3})
    ours = floor.start(WAITING, TWO, {"steps": 1_000_000})
    floor.until(lambda: hasty.step > 0 and ours.step > 0)
    for seen in (hasty, ours):
        os.kill(seen.ranks()[1], signal.SIGSTOP)
    floor.to_end(hasty)
    assert hasty.status == 1
    assert "Timed out" in hasty.done["reason"]
    at = ours.step
    assert not ours.ended
    os.kill(ours.ranks()[1], signal.SIGCONT)
    floor.until(lambda: ours.step > at + 10)
    end(floor, ours)


@pytest.mark.fault
def test_a_killed_rank_ends_the_gang_with_a_reason(floor: Floor) -> None:
    seen = floor.start(WAITING, TWO, {"steps": 1_000_000})
    floor.until(lambda: seen.step > 0)
    ranks = seen.ranks()
    os.kill(ranks[1], signal.SIGKILL)
    floor.to_end(seen)
    assert seen.status == 137
    assert seen.done["reason"] == "rank 1 was killed by SIGKILL"
    assert [procfs.stat(p) for p in ranks] == [None, None]


@pytest.mark.fault
def test_no_rank_outlives_the_first(floor: Floor) -> None:
    seen = floor.start(WAITING, TWO, {"steps": 1_000_000})
    floor.until(lambda: seen.step > 0)
    ranks = seen.ranks()
    os.kill(ranks[0], signal.SIGKILL)
    floor.to_end(seen)
    floor.until(lambda: procfs.stat(ranks[1]) is None)  # gone, and reaped


@pytest.mark.fault
@pytest.mark.parametrize(
    ("how", "rank", "reason"),
    [
        ("input", 1, "rank 1: the third example is bad (take another one)"),
        ("bug", 0, "ValueError: a bug in rank 0"),
        ("memory", 1, "rank 1: failing ran out of memory: it had "),
        ("bug", 1, "rank 1: ValueError: a bug in rank 1"),
        ("bug", -1, "rank 1: ValueError: a bug in rank 1"),
    ],
)
def test_a_rank_that_fails_ends_the_gang_with_its_reason(
    floor: Floor, how: str, rank: int, reason: str
) -> None:
    seen = floor.to_end(floor.start(FAILING, TWO, {"how": how, "rank": rank}))
    assert seen.status == 1
    if how == "memory":  # how much it had differs from run to run
        assert seen.done["reason"].startswith(reason)
        assert seen.done["result"]["error"]["code"] == "out-of-memory"
    else:
        assert seen.done["reason"].startswith(reason)
    assert "\n" not in seen.done["reason"]


def test_bad_data_is_one_line_of_the_first_rank(floor: Floor) -> None:
    data = floor.home / "short.txt"
    data.write_text("too short")
    args = {**SMALL, "data": str(data), "out": "never", "devices": 2}
    seen = floor.to_end(floor.start(PRETRAIN, TWO, args))
    assert seen.status == 1
    assert "is too short" in seen.done["reason"]
    assert "\n" not in seen.done["reason"]


def end(floor: Floor, seen: Seen) -> None:
    floor.driver.signal(seen.worker_id, signal.SIGKILL)
    floor.to_end(seen)
