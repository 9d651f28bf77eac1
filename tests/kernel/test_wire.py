"""Frames: any split of the bytes gives the same values, and nothing above the limit is read."""

from __future__ import annotations

import itertools
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.kernel.errors import ProtocolError
from llmos.kernel.wire import MAX_FRAME_BYTES, Unpacker, pack, unpack

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False)
    | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)  # fmt: skip


@given(plain)
def test_a_value_comes_back_as_it_went(value: Any) -> None:
    assert unpack(pack(value)[4:]) == value


@given(st.lists(plain, max_size=5), st.lists(st.integers(0, 400)))
def test_any_split_of_the_bytes_gives_the_same_values(values: list[Any], cuts: list[int]) -> None:
    data = b"".join(map(pack, values))
    edges = [0, *sorted(c for c in cuts if c < len(data)), len(data)]
    unpacker, found = Unpacker(), []
    for begin, end in itertools.pairwise(edges):
        found += list(unpacker.feed(data[begin:end]))
    assert found == values


def test_a_frame_above_the_limit_is_refused_before_it_is_read() -> None:
    header = struct.pack(">I", MAX_FRAME_BYTES + 1)
    with pytest.raises(ProtocolError, match="claims 16,777,217 bytes"):
        list(Unpacker().feed(header))
    unpacker = Unpacker()
    assert list(unpacker.feed(header[:3])) == []
    with pytest.raises(ProtocolError):
        list(unpacker.feed(header[3:]))
    with pytest.raises(ProtocolError):
        list(Unpacker().feed(pack(1) + header))


def test_the_largest_frame_passes_and_one_byte_more_does_not() -> None:
    body = bytes(MAX_FRAME_BYTES - 5)  # bin32 has a head of five bytes
    assert list(Unpacker().feed(pack(body))) == [body]
    with pytest.raises(ProtocolError, match="above"):
        pack(body + b"x")


@given(st.binary(min_size=1, max_size=60))
def test_garbage_is_a_value_or_a_protocol_error_and_nothing_else(body: bytes) -> None:
    data = struct.pack(">I", len(body)) + body
    try:
        list(Unpacker().feed(data))
    except ProtocolError as exc:
        assert "\n" not in exc.message  # noqa: PT017


def test_an_unfinished_frame_gives_nothing_and_stays() -> None:
    unpacker = Unpacker()
    frame = pack({"a": 1})
    assert list(unpacker.feed(frame[:-1])) == []
    assert list(unpacker.feed(b"")) == []
    assert list(unpacker.feed(frame[-1:])) == [{"a": 1}]
