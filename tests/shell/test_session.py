"""The pure side of the client: bytes to answers, whatever the pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.kernel import protocol as p
from llmos.kernel.errors import NoSuchProcess, ProtocolError
from llmos.kernel.wire import Unpacker, pack
from llmos.shell.session import Failure, Item, Result, Session


def test_requests_are_what_the_kernel_decodes() -> None:
    session = Session()
    number, data = session.send(p.Kill(7, 9))
    [message] = Unpacker().feed(data)
    assert p.decode(message) == (number, p.Kill(7, 9))
    assert session.send(p.Ping())[0] != number


def test_answers_go_to_their_requests() -> None:
    session = Session()
    a, b = session.send(p.Ps())[0], session.send(p.Attach(1))[0]
    data = pack({"id": b, "item": 1}) + pack({"id": a, "ok": []}) + pack({"id": b, "ok": None})
    assert session.receive(data) == [(b, Item(1)), (a, Result([])), (b, Result(None))]


def test_errors_come_back_as_the_class_that_the_kernel_raised() -> None:
    session = Session()
    number, _ = session.send(p.Ps(pid=9))
    wire = NoSuchProcess("there is no process 9").to_wire()
    [(_, answer)] = session.receive(pack({"id": number, "error": wire}))
    assert isinstance(answer, Failure)
    assert isinstance(answer.error, NoSuchProcess)
    assert answer.error.hint == NoSuchProcess.default_hint


def test_what_comes_after_a_cancel_is_dropped() -> None:
    session = Session()
    number, _ = session.send(p.Attach(1))
    [message] = Unpacker().feed(session.cancel(number))
    assert message == {"id": number, "cancel": True}
    assert session.receive(pack({"id": number, "item": 1}) + pack({"id": number, "ok": 1})) == []


@given(cuts=st.lists(st.integers(0, 60), max_size=8))
def test_the_pieces_in_which_bytes_arrive_make_no_difference(cuts: list[int]) -> None:
    session = Session()
    number, _ = session.send(p.Attach(1))
    data = b"".join(pack({"id": number, "item": i}) for i in range(4)) + pack(
        {"id": number, "ok": 1}
    )
    edges = sorted({0, len(data), *(min(c, len(data)) for c in cuts)})
    found = []
    for start, end in pairwise(edges):
        found += session.receive(data[start:end])
    assert [a for _, a in found] == [Item(0), Item(1), Item(2), Item(3), Result(1)]


@pytest.mark.parametrize("message", [1, {"id": 1}, {"ok": 1}, {"id": "1", "ok": 1}])
def test_what_is_no_answer_is_refused(message: object) -> None:
    session = Session()
    session.send(p.Ping())
    with pytest.raises(ProtocolError):
        session.receive(pack(message))
