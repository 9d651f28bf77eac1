"""A program's call to a service: neither a hold nor the death of a kernel makes it fail."""

from __future__ import annotations

import queue
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmos.drivers.base import WorkerSpec
from llmos.drivers.cpu.driver import CpuDriver
from llmos.drivers.forked import ForkedWorker
from llmos.drivers.worker.calling import CALL_PIECE_S, CALL_S
from llmos.drivers.worker.main import Worker
from llmos.kernel.errors import TimedOut


class Inbox:
    """Gives nothing `empty` times, then what is in it."""

    def __init__(self, empty: int, *messages: dict[str, Any]) -> None:
        self.empty, self.messages = empty, list(messages)

    def get(self, timeout: float) -> dict[str, Any]:
        assert timeout == CALL_PIECE_S
        if self.empty:
            self.empty -= 1
            raise queue.Empty
        return self.messages.pop(0)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    listener, other = socket.socketpair()  # nobody dials it
    yield Worker({"worker_id": "w1-1", "home": str(tmp_path), "folder": str(tmp_path)}, listener)
    listener.close()
    other.close()


def test_a_hold_in_the_middle_of_a_call_costs_one_piece_of_its_time(worker: Worker) -> None:
    # The one piece was an hour by the clock: the worker was held in it.
    worker.link.inbox = Inbox(1, {"k": "stop"}, {"k": "answer", "id": 1, "ok": 5})  # type: ignore[assignment]
    assert worker.call("models.ls") == 5
    assert worker.later == [{"k": "stop"}]


def test_a_call_that_nobody_answers_ends(worker: Worker) -> None:
    worker.link.inbox = inbox = Inbox(10_000)  # type: ignore[assignment]
    with pytest.raises(TimedOut, match="no answer in 120 s"):
        worker.call("models.ls")
    assert 10_000 - inbox.empty == CALL_S / CALL_PIECE_S


def test_a_call_is_not_acknowledged_before_its_answer(tmp_path: Path) -> None:
    driver = CpuDriver(["cpu0"])
    told: list[Any] = []
    sent: list[dict[str, Any]] = []
    driver._tell = told.append
    driver.send = lambda _, message: sent.append(message)  # type: ignore[method-assign,assignment]
    worker = ForkedWorker(WorkerSpec("w1-1", "cpu0", tmp_path, tmp_path / "log", tmp_path), "")
    driver._said(worker, {"k": "loaded", "seq": 1})
    driver._said(worker, {"k": "call", "id": 1, "method": "a.b", "args": {}, "seq": 2})
    assert len(told) == 2
    assert sent == [{"k": "ack", "seq": 1}], "the next kernel must hear of the call"
