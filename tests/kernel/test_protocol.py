"""The calls on the wire: old bytes decode for ever, and what is wrong is named."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.kernel import errors, protocol
from llmos.kernel.errors import BadArgument, LlmosError, ProtocolError
from llmos.kernel.syscalls import HANDLERS
from llmos.kernel.wire import pack, unpack

P = protocol

# Written by version 1. Never edit these bytes; add a line instead.
OLD: dict[str, tuple[bytes, Any]] = {
    "ping": (b"\x83\xa2id\x01\xa4call\xa4ping\xa4args\x80", P.Ping()),
    "no args": (b"\x82\xa2id\x02\xa4call\xa4ping", P.Ping()),
    "status": (b"\x83\xa2id\x01\xa4call\xa6status\xa4args\x80", P.Status()),
    "ps": (b"\x83\xa2id\x01\xa4call\xa2ps\xa4args\x81\xa3all\xc3", P.Ps(all=True)),
    "mem": (b"\x83\xa2id\x01\xa4call\xa3mem\xa4args\x80", P.Mem()),
    "explain": (b"\x83\xa2id\x01\xa4call\xa7explain\xa4args\x81\xa3pid\x07", P.Explain(7)),
    "dmesg": (
        b"\x83\xa2id\x01\xa4call\xa5dmesg\xa4args\x82\xa3pid\x07\xa5level\xa7warning",
        P.Dmesg(pid=7, level="warning"),
    ),
    "programs": (b"\x83\xa2id\x01\xa4call\xa8programs\xa4args\x80", P.Programs()),
    "submit": (
        b"\x83\xa2id\x01\xa4call\xa6submit\xa4args\x82\xa7program\xa4spin\xa4args\x81\xa5steps\x03",
        P.Submit("spin", {"steps": 3}),
    ),
    "kill": (b"\x83\xa2id\x01\xa4call\xa4kill\xa4args\x82\xa3pid\x07\xa6signal\x09", P.Kill(7, 9)),
    "renice": (
        b"\x83\xa2id\x01\xa4call\xa6renice\xa4args\x82\xa3pid\x07\xa4nice\xfb",
        P.Renice(7, -5),
    ),
    "pause": (b"\x83\xa2id\x01\xa4call\xa5pause\xa4args\x81\xa3pid\x07", P.Pause(7)),
    "resume": (b"\x83\xa2id\x01\xa4call\xa6resume\xa4args\x81\xa3pid\x07", P.Resume(7)),
    "checkpoint": (b"\x83\xa2id\x01\xa4call\xaacheckpoint\xa4args\x81\xa3pid\x07", P.Checkpoint(7)),
    "wait": (
        b"\x83\xa2id\x01\xa4call\xa4wait\xa4args\x82\xa3pid\x07"
        b"\xa9timeout_s\xcb?\xe0\x00\x00\x00\x00\x00\x00",
        P.Wait(7, 0.5),
    ),
    "attach": (
        b"\x83\xa2id\x01\xa4call\xa6attach\xa4args\x82\xa3pid\x07\xa6offset\x64",
        P.Attach(7, 100),
    ),
    "logs": (
        b"\x83\xa2id\x01\xa4call\xa4logs\xa4args\x82\xa3pid\x07\xa4tail\x0a",
        P.Logs(7, tail=10),
    ),
    "send": (
        b"\x83\xa2id\x01\xa4call\xa4send\xa4args\x82\xa3pid\x07\xa7message\x81\xa4text\xa2hi",
        P.Send(7, {"text": "hi"}),
    ),
    "call": (
        b"\x83\xa2id\x01\xa4call\xa4call\xa4args\x81\xa6method\xa9models.ls",
        P.Call("models.ls"),
    ),
    "services": (b"\x83\xa2id\x01\xa4call\xa8services\xa4args\x80", P.Services()),
    "events": (b"\x83\xa2id\x01\xa4call\xa6events\xa4args\x81\xa5since\xcd\x01\x00", P.Events(256)),
    "shutdown": (b"\x83\xa2id\x01\xa4call\xa8shutdown\xa4args\x80", P.Shutdown()),
}


@pytest.mark.parametrize("name", OLD)
def test_old_bytes_decode_for_ever(name: str) -> None:
    body, request = OLD[name]
    assert protocol.decode(unpack(body))[1] == request


def test_there_are_old_bytes_of_every_call() -> None:
    assert set(protocol.REQUESTS) <= set(OLD)


def test_every_request_has_a_handler_in_a_file_of_its_name() -> None:
    requests = set(typing.get_args(protocol.Request))
    assert set(HANDLERS) == requests
    folder = Path(str(protocol.__file__)).parent / "syscalls"
    files = {p.stem for p in folder.glob("*.py")} - {"__init__"}
    assert files == {cls.__name__.lower() for cls in requests}
    for cls, handler in HANDLERS.items():
        assert handler.__module__ == f"llmos.kernel.syscalls.{cls.__name__.lower()}"


def test_every_request_says_what_it_is_for() -> None:
    for cls in protocol.REQUESTS.values():
        if cls is not protocol.Resume:  # the opposite of Pause
            assert cls.__doc__
            assert not cls.__doc__.startswith(cls.__name__ + "("), (
                f"{cls.__name__} has no docstring"
            )


@pytest.mark.parametrize("cls", protocol.REQUESTS.values(), ids=lambda c: c.__name__)
def test_new_fields_have_defaults_and_the_first_ones_are_what_they_were(cls: type) -> None:
    first = {"Submit": ["program"], "Renice": ["pid", "nice"], "Send": ["pid", "message"],
             "Call": ["method"]}  # fmt: skip
    needed = [f.name for f in dataclasses.fields(cls) if protocol._required(f)]
    assert needed in ([], ["pid"], first.get(cls.__name__))


BAD: dict[str, tuple[Any, type[LlmosError], str]] = {
    "no map": ([], ProtocolError, "a request is a map"),
    "no id": ({"call": "ping"}, ProtocolError, "integer `id`"),
    "no call": ({"id": 1}, BadArgument, "there is no call None"),
    "an unknown call": ({"id": 1, "call": "kil"}, BadArgument, "there is no call 'kil'"),
    "args no map": ({"id": 1, "call": "kill", "args": [7]}, ProtocolError, "is a map"),
    "an unknown field": (
        {"id": 1, "call": "kill", "args": {"pid": 7, "sig": 9}},
        BadArgument,
        "kill has no field 'sig'",
    ),
    "a wrong type": (
        {"id": 1, "call": "kill", "args": {"pid": "7"}},
        BadArgument,
        "pid is an integer",
    ),
    "a bool is no integer": (
        {"id": 1, "call": "kill", "args": {"pid": True}},
        BadArgument,
        "integer",
    ),
    "an integer is no bool": (
        {"id": 1, "call": "ps", "args": {"all": 1}},
        BadArgument,
        "true or false",
    ),
    "a map with other keys": (
        {"id": 1, "call": "submit", "args": {"program": "x", "args": {1: 2}}},
        BadArgument,
        "args is a map",
    ),
    "a missing field": (
        {"id": 1, "call": "renice", "args": {"nice": 7}},
        BadArgument,
        "renice needs pid",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named(name: str) -> None:
    message, error, says = BAD[name]
    with pytest.raises(error) as caught:
        protocol.decode(message)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_number_may_be_whole_and_none_where_it_may_be() -> None:
    assert protocol.decode({"id": 1, "call": "wait", "args": {"pid": 1, "timeout_s": 3}})[
        1
    ] == P.Wait(1, 3)
    assert protocol.decode({"id": 1, "call": "wait", "args": {"pid": 1, "timeout_s": None}})[
        1
    ] == P.Wait(1)


def test_a_huge_wrong_value_does_not_come_back_whole() -> None:
    with pytest.raises(BadArgument) as caught:
        protocol.decode({"id": 1, "call": "kill", "args": {"pid": "x" * 1_000_000}})
    assert len(str(caught.value)) <= 500


values = {
    int: st.integers(-(2**63), 2**63 - 1),
    str: st.text(max_size=20),
    bool: st.booleans(),
    float: st.floats(allow_nan=False),
    int | None: st.none() | st.integers(-(2**63), 2**63 - 1),
    str | None: st.none() | st.text(max_size=20),
    float | None: st.none() | st.floats(allow_nan=False),
    dict[str, Any]: st.dictionaries(st.text(max_size=5), st.integers(-9, 9) | st.text(max_size=5)),
    dict[str, str]: st.dictionaries(st.text(max_size=5), st.text(max_size=5)),
}


@st.composite
def requests(draw: st.DrawFn) -> Any:
    cls = draw(st.sampled_from(list(protocol.REQUESTS.values())))
    hints = typing.get_type_hints(cls)
    return cls(**{f.name: draw(values[hints[f.name]]) for f in dataclasses.fields(cls)})


@given(requests(), st.integers(0, 2**32))
def test_a_request_comes_out_of_the_wire_as_it_went_in(request: Any, number: int) -> None:
    sent = unpack(pack(protocol.encode(request, number))[4:])
    assert protocol.decode(sent) == (number, request)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
)


@given(
    plain
    | st.fixed_dictionaries(
        {"id": plain | st.integers(), "call": plain | st.sampled_from(sorted(protocol.REQUESTS))},
        optional={"args": plain},
    )
)
def test_anything_decodes_or_is_refused_by_an_error_of_ours(message: Any) -> None:
    try:
        protocol.decode(message)
    except LlmosError as exc:
        assert exc.message  # noqa: PT017


def _own_errors() -> list[type[LlmosError]]:
    """Those of kernel/errors.py; a room may have private ones below them."""
    return [c for c in errors._tree(LlmosError) if c.__module__ == errors.__name__]


def test_error_codes_are_unique_and_come_back_as_they_went() -> None:
    tree = _own_errors()
    codes = [cls.code for cls in tree]
    assert len(set(codes)) == len(codes) == len(errors.BY_CODE)
    for cls in tree:
        came = errors.from_wire(cls("what", "do this").to_wire())
        assert (type(came), came.message, came.hint) == (cls, "what", "do this")
        assert cls.code in errors.from_wire({"code": cls.code}).to_wire()["code"]
    assert type(errors.from_wire({"code": "of the future", "message": "m"})) is LlmosError


def test_the_tree_of_errors_is_drawn_as_it_is() -> None:
    drawn = str(errors.__doc__)
    for cls in _own_errors():
        assert cls.__name__ in drawn
