"""Streams and logs by byte offset."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.drivers.worker.stream import Stream, whole_records
from llmos.kernel import streams
from llmos.kernel.errors import ProtocolError
from llmos.kernel.streams import (
    KEPT_OPEN,
    PIECE_BYTES,
    Growth,
    StreamReader,
    open_plain,
    read_bytes,
    tail_offset,
)
from llmos.kernel.wire import pack


def read_records(path: Path, offset: int) -> tuple[list[tuple[int, dict[str, Any]]], int]:
    """By a reader that reads once."""
    with contextlib.closing(StreamReader(path)) as reader:
        return reader.read(offset)


def everything(path: Path, offset: int = 0) -> list[int]:
    found: list[int] = []
    while True:
        records, after = read_records(path, offset)
        if not records:
            return found
        assert records[-1][0] == after
        found += [r["n"] for _, r in records]
        offset = after


def test_every_offset_leads_to_exactly_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    path.write_bytes(b"".join(pack({"n": n}) for n in range(50)))
    offsets = [0, *(after for after, _ in read_records(path, 0)[0])]
    for n, offset in enumerate(offsets):
        assert everything(path, offset) == list(range(n, 50))


def test_a_stream_longer_than_a_piece_is_read_piece_by_piece(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    path.write_bytes(b"".join(pack({"n": n, "text": "x" * 1000}) for n in range(300)))
    first, _ = read_records(path, 0)
    assert 0 < len(first) < 300
    assert everything(path) == list(range(300))


def test_a_record_larger_than_a_piece_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    sizes = (3 * PIECE_BYTES, PIECE_BYTES, PIECE_BYTES - 20, 5)
    path.write_bytes(b"".join(pack({"n": n, "text": "x" * s}) for n, s in enumerate(sizes)))
    assert everything(path) == [0, 1, 2, 3]


@given(st.integers(0, 60))
def test_a_torn_tail_is_not_read_and_is_cut_off_by_the_next_writer(lost: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stream"
        data = b"".join(pack({"n": n}) for n in range(12))
        path.write_bytes(data[: len(data) - lost])
        whole = everything(path)
        assert whole == list(range(len(whole)))
        stream = Stream(path)
        assert [r["n"] for r in whole_records(path)[1]] == whole
        stream.append("text", {"n": 99})
        stream.close()
        assert everything(path) == [*whole, 99]


def test_a_large_torn_record_waits_for_its_rest(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    frame = pack({"n": 1, "text": "x" * (2 * PIECE_BYTES)})
    path.write_bytes(frame[:-1])
    assert read_records(path, 0) == ([], 0)
    path.write_bytes(frame)
    assert everything(path) == [1]


def test_an_offset_where_no_record_begins_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    path.write_bytes(pack({"text": "abcdefgh"}))
    with pytest.raises(ProtocolError, match="no record begins at offset 6"):
        read_records(path, 6)


def test_a_stream_that_is_not_there_yet_is_empty(tmp_path: Path) -> None:
    assert read_records(tmp_path / "none", 0) == ([], 0)
    assert read_bytes(tmp_path / "none", 5) == b""
    assert tail_offset(tmp_path / "none", 3) == 0
    assert whole_records(tmp_path / "none") == (0, [])


@pytest.mark.parametrize(
    ("text", "lines", "tail"),
    [
        ("a\nb\nc\n", 2, "b\nc\n"),
        ("a\nb\nc", 2, "b\nc"),
        ("a\nb\nc\n", 9, "a\nb\nc\n"),
        ("a\nb\nc\n", 0, ""),
        ("", 3, ""),
        ("\n\n\n", 2, "\n\n"),
        ("x" * 100_000 + "\ny\n", 1, "y\n"),
    ],
)
def test_the_tail_of_a_log(tmp_path: Path, text: str, lines: int, tail: str) -> None:
    path = tmp_path / "log"
    path.write_text(text)
    assert read_bytes(path, tail_offset(path, lines), 1 << 20) == tail.encode()


def test_who_waits_for_growth_is_woken_by_it_and_by_nothing_else() -> None:
    async def go() -> None:
        growth = Growth()
        waits = [asyncio.create_task(growth.wait(pid)) for pid in (1, 1, 2)]
        await asyncio.sleep(0)
        growth.grown(1)
        await asyncio.gather(*waits[:2])
        assert not waits[2].done()
        growth.grown(2)
        await waits[2]
        await growth.wait(3, 0.001)  # nobody comes: it ends by itself

    asyncio.run(go())


def test_who_looks_in_vain_leaves_nothing_behind() -> None:
    async def go() -> None:
        growth = Growth()
        for _ in range(3):
            await growth.wait(1, 0.001)
        assert growth._waiting == {}
        waits = asyncio.ensure_future(growth.wait(1))
        await asyncio.sleep(0)
        growth.grown(1)
        await waits

    asyncio.run(go())


def grow(path: Path, number: int) -> None:
    with path.open("ab") as file:
        file.write(pack({"number": number}))


def numbers(found: tuple[list[tuple[int, dict[str, Any]]], int]) -> list[int]:
    return [record["number"] for _, record in found[0]]


@pytest.mark.parametrize("kept", [KEPT_OPEN, 0], ids=["open", "opened each time"])
def test_a_reader_finds_what_its_file_has_grown_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    monkeypatch.setattr(streams, "KEPT_OPEN", kept)
    path, opened = tmp_path / "stream", []
    monkeypatch.setattr(streams, "open_plain", lambda p: opened.append(p) or open_plain(p))
    with contextlib.closing(StreamReader(path)) as reader:
        assert reader.read(0) == ([], 0), "not there yet"
        opened.clear()
        offset = 0
        for number in range(3):
            grow(path, number)
            found = reader.read(offset)
            assert numbers(found) == [number]
            offset = found[1]
        assert len(opened) == (1 if kept else 3)
        path.unlink()
        assert reader.read(offset) == ([], offset)
        grow(path, 7)
        assert numbers(reader.read(0)) == [7], "another file took its place"
    assert StreamReader._kept == 0
