"""The line between kernel and worker: a handshake, and nothing that matters is lost with it."""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from llmos.drivers.link import WorkerLink, dial
from llmos.drivers.worker.link import Link
from llmos.kernel.wire import Unpacker, pack
from support.live import short_home
from support.real import wait_until

SECRET = "open sesame"


class End:
    """The kernel's end, by hand."""

    def __init__(self, path: Path, secret: str = SECRET) -> None:
        self.line = socket.socket(socket.AF_UNIX)
        self.line.settimeout(10)
        self.line.connect(str(path))
        self.unpacker = Unpacker()
        self.read: list[dict[str, Any]] = []
        self.send({"k": "hello", "proto": 1, "secret": secret, "home_id": "h"})

    def send(self, message: Any) -> None:
        self.line.sendall(pack(message))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.line.close()

    def next(self) -> dict[str, Any]:
        while not self.read:
            data = self.line.recv(1 << 16)
            assert data, "the worker hung up"
            self.read += list(self.unpacker.feed(data))
        return self.read.pop(0)


@pytest.fixture
def place() -> Iterator[tuple[Link, Path]]:
    home = short_home()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(home / "sock"))
    listener.listen()
    link = Link(listener, "w1-1", SECRET, lambda: {"loaded": True, "step": 3, "guests": [5]})
    yield link, home / "sock"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    shutil.rmtree(home)


def test_the_hello_says_who_and_where(place: tuple[Link, Path]) -> None:
    _, path = place
    with End(path) as end:
        hello = end.next()
    assert (hello["k"], hello["worker_id"], hello["step"]) == ("hello", "w1-1", 3)
    assert (hello["loaded"], hello["guests"]) == (True, [5])
    assert hello["os_pid"] > 0


def test_a_guest_whose_end_was_not_heard_is_still_named(place: tuple[Link, Path]) -> None:
    link, path = place
    link.post({"k": "guest_done", "pid": 9, "status": 0}, keep=True)
    with End(path) as end:
        assert end.next()["guests"] == [5, 9]
        assert end.next()["k"] == "guest_done"


def test_each_is_acknowledged_by_its_own_number_and_a_call_by_its_answer(
    place: tuple[Link, Path],
) -> None:
    link, path = place
    link.post({"k": "guest_done", "pid": 9, "status": 0}, keep=True)
    link.post({"k": "call", "id": 4, "method": "models.ls"}, keep=True)
    link.post({"k": "checkpointed", "step": 1}, keep=True)
    with End(path) as end:
        for _ in range(3):
            end.next()
        end.send({"k": "ack", "seq": end.next()["seq"]})
        wait_until(lambda: link.kept() == 2, "the last to be acknowledged")
        end.send({"k": "answer", "id": 4, "ok": None})
        wait_until(lambda: link.kept() == 1, "the call to be answered")
    with End(path) as end:
        assert [end.next()["k"], end.next()["k"]] == ["hello", "guest_done"]


def test_messages_of_the_kernel_reach_the_worker_in_order(place: tuple[Link, Path]) -> None:
    link, path = place
    with End(path) as end:
        for n in range(5):
            end.send({"k": "lease", "floor": n})
    assert [link.inbox.get(timeout=5)["floor"] for _ in range(5)] == list(range(5))


def test_what_is_kept_is_sent_again_until_it_is_acknowledged(place: tuple[Link, Path]) -> None:
    link, path = place
    link.post({"k": "report", "step": 1})
    link.post({"k": "checkpointed", "step": 1}, keep=True)
    link.post({"k": "done", "status": 0}, keep=True)
    for _ in range(2):  # a kernel that dies before it says that it has them
        with End(path) as end:
            assert [end.next()["k"] for _ in range(3)] == ["hello", "checkpointed", "done"]
    with End(path) as end:
        end.next()
        first = end.next()
        end.send({"k": "ack", "seq": first["seq"]})
        wait_until(lambda: link.kept() == 1, "the acknowledgement", 10)
    with End(path) as end:
        assert [end.next()["k"] for _ in range(2)] == ["hello", "done"]
        end.send({"k": "ack", "seq": first["seq"] + 1})
        wait_until(lambda: link.kept() == 0, "the acknowledgement", 10)


def test_a_wrong_secret_gets_nothing_and_the_next_one_is_served(place: tuple[Link, Path]) -> None:
    link, path = place
    link.post({"k": "done"}, keep=True)
    with End(path, "wrong") as thief:
        assert thief.line.recv(100) == b""
    with End(path) as end:
        assert end.next()["k"] == "hello"


@pytest.mark.parametrize(
    "garbage", [b"\xff\xff\xff\xff", b"\x00\x00\x00\x01\xc1", pack([1, 2]), pack(7)]
)
def test_garbage_does_not_deafen_the_worker(place: tuple[Link, Path], garbage: bytes) -> None:
    link, path = place
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(10)
        line.connect(str(path))
        line.sendall(garbage)
        assert line.recv(100) == b""
    with End(path) as end:
        assert end.next()["k"] == "hello"
        end.send({"k": "stop"})
    assert link.inbox.get(timeout=5) == {"k": "stop"}


def test_the_drivers_end_dials_says_hello_and_hears_of_the_end(place: tuple[Link, Path]) -> None:
    link, path = place

    async def go() -> None:
        said: list[dict[str, Any]] = []
        lost = asyncio.Event()
        news = asyncio.Event()

        def hear(message: dict[str, Any]) -> None:
            said.append(message)
            news.set()

        line = await dial(str(path), lambda: WorkerLink({"secret": SECRET}, hear, lost.set))
        assert line is not None
        line.send({"k": "lease", "floor": 2})
        async with asyncio.timeout(10):
            await news.wait()
        assert said[0]["k"] == "hello"
        line.close()
        async with asyncio.timeout(10):
            await lost.wait()
        line.send({"k": "lost"})  # harmless

    asyncio.run(go())
    assert link.inbox.get(timeout=5)["k"] == "lease"


def test_nobody_answers_a_dial_to_a_socket_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmos.drivers.link.REDIAL_S", (0.001, 0.001))

    async def go() -> WorkerLink | None:
        return await dial(str(tmp_path / "s"), lambda: WorkerLink({}, lambda m: None, lambda: None))

    assert asyncio.run(go()) is None
