"""What a worker says when memory runs out: every way in which that can show."""

from __future__ import annotations

import json
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmos.drivers.worker import memory
from llmos.drivers.worker.main import Worker
from llmos.kernel.errors import BadInput, OutOfMemory, from_wire

MIB = 1024**2
HUGE = 1 << 58


def cpu_tensor() -> None:
    torch.empty(HUGE, dtype=torch.uint8)


def cuda_tensor() -> None:
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.25 GiB"
    )


def numbers() -> None:
    np.empty(HUGE, np.uint8)


def plain() -> None:
    bytearray(1 << 60)


def hidden() -> None:
    try:
        cpu_tensor()
    except RuntimeError as exc:
        raise BadInput(f"cannot load the model: {exc}") from None


def system() -> None:
    raise OSError(12, "Cannot allocate memory")


SHORTAGES = [cpu_tensor, cuda_tensor, numbers, plain, hidden, system]
WANTED = {cpu_tensor: HUGE, hidden: HUGE, numbers: HUGE, cuda_tensor: 20 << 30}


def raised(what: Callable[[], None]) -> Exception:
    try:
        what()
    except Exception as exc:  # noqa: BLE001  whatever it is
        return exc
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("what", SHORTAGES, ids=lambda f: f.__name__)
def test_every_way_in_which_memory_runs_out_is_seen(what: Callable[[], None]) -> None:
    found = memory.shortage(raised(what))
    assert found is not None
    assert memory.wanted_bytes(found) == WANTED.get(what)


@pytest.mark.parametrize(
    "exc",
    [ValueError("out of memory"), RuntimeError("shapes do not match"), OSError(2, "no such file"),
     BadInput("not UTF-8"), KeyError("x")],
    ids=repr,
)  # fmt: skip
def test_other_errors_are_not_taken_for_it(exc: Exception) -> None:
    assert memory.shortage(exc) is None


def test_a_ring_of_causes_ends() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__context__, second.__context__ = second, first
    assert memory.shortage(first) is None


def test_the_account_names_the_program_and_has_the_figures() -> None:
    found = memory.account(raised(cuda_tensor), "pretrain", "cpu", 3 * 1024 * MIB)
    error = from_wire(found["error"])
    assert isinstance(error, OutOfMemory)
    assert error.message.startswith("pretrain ran out of memory: it had ")
    assert "of the 3.0 GiB it was promised, and asked for 20.0 GiB more" in error.message
    assert error.hint
    assert found["memory"]["wanted_bytes"] == 20 << 30
    assert found["memory"]["promised_bytes"] == 3 << 30
    assert found["memory"]["peak_bytes"] > MIB
    assert json.dumps(found)
    unknown = memory.account(raised(plain), "gan", "cpu", 0)
    assert unknown["memory"]["promised_bytes"] is unknown["memory"]["wanted_bytes"] is None
    assert "promised" not in unknown["error"]["message"]


@pytest.mark.slow
def test_the_reserve_is_there_when_nothing_else_is() -> None:
    """In a process of its own: at its wall it can still say its last words."""
    code = (
        "import resource\n"
        "from llmos.drivers.worker import memory\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (memory.data_bytes() + (8 << 20), -1))\n"
        "held = []\n"
        "try:\n"
        "    while True: held.append(bytearray(1 << 20))\n"
        "except MemoryError:\n"
        "    memory.take_reserve()\n"
        "    words = bytearray(40 << 20)\n"
        "    print(len(held), len(words) >> 20)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    held, words = map(int, ended.stdout.split())
    assert 1 <= held <= 8
    assert words == 40


def test_without_a_wall_there_is_nothing_to_raise() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    memory.take_reserve()
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_caches_are_given_back_and_counted() -> None:
    held = [bytearray(1000) for _ in range(100_000)]  # small ones: they stay in the heap when freed
    before = memory.had_now("cpu")
    del held
    memory.drop_caches("cpu")
    assert memory.had_now("cpu") <= before - 50 * MIB


class Shrinks:
    """A program that can halve its batch once, and holds a cache that it can drop."""

    name = "shrinks"
    has_checkpoint = False

    def __init__(self) -> None:
        self.cache = bytearray(32 * MIB)
        self.cache[::4096] = b"x" * (len(self.cache) // 4096)
        self.asked: list[str] = []

    def shrink(self, ctx: Any, level: str) -> bool:
        self.asked.append(level)
        if level == "caches":
            self.cache = bytearray()
        return level == "caches"


def test_a_shrink_is_answered_with_what_it_gave_back_until_it_is_acknowledged(
    worker: Worker,
) -> None:
    worker.program = Shrinks()
    for level in ("caches", "batch"):
        worker.link.inbox.put({"k": "shrink", "level": level})
    worker.obey(wait=False)
    assert worker.program.asked == ["caches", "batch"]
    first, second = worker.link._kept.values()
    assert (first["k"], first["level"], first["shrank"], first["seq"]) == (
        "shrunk", "caches", True, 1,
    )  # fmt: skip
    assert first["freed_bytes"] >= 30 * MIB
    assert (second["level"], second["shrank"], second["seq"]) == ("batch", False, 2)


class Hungry:
    """A program that wants more than there is, at the step that `at` says."""

    name = "hungry"
    has_checkpoint = False
    args = None

    def __init__(self, what: Callable[[], None]) -> None:
        self.what = what

    def step(self, ctx: Any) -> Any:
        self.what()

    def close(self) -> None:
        pass


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    listener, other = socket.socketpair()  # nobody dials it
    made = Worker({"worker_id": "w1-1", "home": str(tmp_path), "folder": str(tmp_path)}, listener)
    yield made
    listener.close()
    other.close()


@pytest.mark.parametrize("what", SHORTAGES, ids=lambda f: f.__name__)
def test_a_worker_ends_with_one_line_and_the_figures(
    worker: Worker, what: Callable[[], None], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("llmos.drivers.worker.main.LAST_WORDS_S", 0.0)  # nobody listens
    worker.program = Hungry(what)
    worker.link.promised_bytes = 5 * MIB
    worker.await_load = dict  # type: ignore[method-assign]
    worker.load = lambda m: None  # type: ignore[method-assign]
    assert worker.run() == 1
    end = json.loads((worker.work / "result.json").read_text())
    assert end["reason"].startswith("hungry ran out of memory: it had ")
    assert end["reason"].count("\n") == 0
    assert end["result"]["error"]["code"] == "out-of-memory"
    assert end["result"]["memory"]["promised_bytes"] == 5 * MIB
    assert "Traceback" in capsys.readouterr().err, "the log has the whole story"
