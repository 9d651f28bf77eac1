"""Whatever bytes come, the decoders say what is wrong in one kind of error, and keep no more than
one frame. The long run against a real kernel is tests/fault/fuzz_protocol.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.kernel import protocol as p
from llmos.kernel.errors import BadArgument, ProtocolError
from llmos.kernel.wire import MAX_FRAME_BYTES, NOTHING, Unpacker, pack
from support.frames import Frames
from support.live import Live, in_kernel

SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text()
    | st.binary()
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text() | st.integers(-5, 5), inner, max_size=4)
    ),
    max_leaves=12,
)


def pop_all(unpacker: Unpacker) -> list[Any]:
    found = []
    while (value := unpacker.pop()) is not NOTHING:
        found.append(value)
    return found


@settings(max_examples=40)
@given(st.lists(VALUES, max_size=5), st.lists(st.integers(1, 40), max_size=30))
def test_frames_come_out_as_they_went_in_however_they_are_cut(
    values: list[Any], cuts: list[int]
) -> None:
    data, found, unpacker = b"".join(map(pack, values)), [], Unpacker()
    for size in [*cuts, len(data)]:
        unpacker.push(data[:size])
        data = data[size:]
        found += pop_all(unpacker)
    assert repr(found) == repr(values)  # NaN is not itself
    assert len(unpacker) == 0


@given(st.binary(max_size=300))
def test_any_bytes_are_values_or_a_protocol_error(data: bytes) -> None:
    pushed, fed = Unpacker(), Unpacker()
    pushed.push(data)
    outcomes: list[str] = []
    reads: list[Callable[[], list[Any]]] = [
        partial(pop_all, pushed), lambda: list(fed.feed(data))
    ]  # fmt: skip
    for take in reads:
        try:
            outcomes.append(repr(take()))
        except ProtocolError as exc:
            outcomes.append(exc.message)
    assert outcomes[0] == outcomes[1], "both ways of reading agree"


@settings(max_examples=60)
@given(VALUES)
def test_any_value_is_a_request_or_one_of_two_errors(value: Any) -> None:
    try:
        number, request = p.decode(value)
    except (ProtocolError, BadArgument) as exc:
        number, request = len(exc.message), p.Ping()
    assert isinstance(number, int)
    assert type(request) in p.REQUESTS.values()


@given(st.sampled_from(sorted(p.REQUESTS)), st.dictionaries(st.text(), VALUES, max_size=4), VALUES)
@settings(max_examples=40)
def test_any_fields_of_a_call_are_checked(name: str, args: dict[str, Any], value: Any) -> None:
    fields = list(p.REQUESTS[name].__dataclass_fields__)
    for chosen in ({**args}, dict.fromkeys(fields, value), dict.fromkeys(fields[:1], value)):
        try:
            _, request = p.decode({"id": 1, "call": name, "args": chosen})
        except (ProtocolError, BadArgument):
            continue
        for field in fields:
            held = getattr(request, field)
            assert held == held, "no NaN gets in at the top"


@pytest.mark.parametrize("depth", [33, 500, 1024, 100_000])
def test_what_is_nested_too_deep_is_refused_by_whoever_meets_it_first(depth: int) -> None:
    body = b"\x83\xa2id\x01\xa4call\xa4ping\xa4args" + b"\x91" * depth + b"\xc0"
    unpacker = Unpacker()
    unpacker.push(len(body).to_bytes(4, "big") + body)
    with pytest.raises(ProtocolError):
        p.decode(unpacker.pop())


def test_a_length_above_the_limit_is_refused_with_nothing_kept() -> None:
    unpacker = Unpacker()
    unpacker.push((MAX_FRAME_BYTES + 1).to_bytes(4, "big"))
    with pytest.raises(ProtocolError, match="the limit is"):
        unpacker.pop()


@in_kernel
async def test_some_thousand_bad_frames_at_a_real_kernel(live: Live) -> None:
    frames, before = Frames(7), len(live.kernel.clients)
    for _ in range(40):
        reader, writer = await asyncio.open_unix_connection(str(live.kernel.home.socket))
        cut = False
        for _ in range(60):
            if not cut:
                frame, cut = frames.next()
                writer.write(frame)
        writer.write(pack({"id": 1 << 50, "call": "ping"}))
        writer.write_eof()
        async with asyncio.timeout(20):
            while await reader.read(1 << 16):
                pass
        writer.transport.abort()
        assert await live.ask(p.Ping()) is None
    async with asyncio.timeout(5):
        while len(live.kernel.clients) > before:  # noqa: ASYNC110
            await asyncio.sleep(0.002)
