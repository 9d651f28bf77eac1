"""Find the rows of processes in the bytes of a database that SQLite cannot read any more.

Three ways, each for what the one before cannot reach: the cells of every page that looks like a
leaf of a table (with their overflow pages), and any place where a row begins. Rows check themselves
(kernel/rows.py), so what is found is whole; of several of a process the newest counts.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import msgpack

from llmos.kernel.process import Process
from llmos.kernel.rows import SIGNATURE, DamagedRow, Worker, unpack

_LEAF = 0x0D
_WAL_HEADER, _FRAME_HEADER = 32, 24
_WAL_MAGIC = 0x377F0682
_FIRST_PAGE_HEADER = 100
MOST_ROW_BYTES = 16 * 1024**2

Found = tuple[int, bytes, Process, Worker]  # seq, row, what it says


def rows_in(db: bytes, wal: bytes) -> dict[int, Found]:
    """By pid the newest whole row in a database file and its log."""
    best: dict[int, Found] = {}
    for row in _candidates(db, wal):
        try:
            proc, worker, seq = unpack(row)
        except DamagedRow:
            continue
        known = best.get(proc.pid)
        if known is None or seq > known[0]:
            best[proc.pid] = (seq, row, proc, worker)
    return best


def _candidates(db: bytes, wal: bytes) -> Iterator[bytes]:
    size = _page_size(db, wal)
    pages = {n + 1: db[at : at + size] for n, at in enumerate(range(0, len(db), size))}
    versions = list(pages.items())
    for number, page in _frames(wal, size):
        versions.append((number, page))
        pages[number] = page  # overflow pages are looked up as they were last
    for number, page in versions:
        yield from _cells(number, page, pages, size)
    for data in (db, wal):
        yield from _signed(data)


def _page_size(db: bytes, wal: bytes) -> int:
    for data, form, at in ((db, ">H", 16), (wal, ">I", 8)):
        if len(data) >= at + 4:
            (size,) = struct.unpack_from(form, data, at)
            size = 65536 if size == 1 else size
            if 512 <= size <= 65536 and size & (size - 1) == 0:
                return int(size)
    return 4096


def _frames(wal: bytes, size: int) -> Iterator[tuple[int, bytes]]:
    """(page number, page) as they were written. Frames of an earlier round are among them: they
    are older copies, and a row says how new it is."""
    for at in range(_WAL_HEADER, len(wal) - _FRAME_HEADER - size + 1, _FRAME_HEADER + size):
        (number,) = struct.unpack_from(">I", wal, at)
        begin = at + _FRAME_HEADER
        yield number, wal[begin : begin + size]


def log_is_damaged(wal: bytes) -> bool:
    """Are there frames of the log's present round that SQLite does not read, and so forgets?

    Also when it ends in the middle of a commit: that is a power cut, or its end is missing.
    """
    if len(wal) < _WAL_HEADER:
        return len(wal) > 0
    magic, _, size, _, salts = struct.unpack_from(">IIII8s", wal)
    size = 65536 if size == 1 else size
    if magic not in (_WAL_MAGIC, _WAL_MAGIC | 1) or not 512 <= size <= 65536:
        return True
    form = ">" if magic & 1 else "<"
    sums = _sums(wal[:24], form, (0, 0))
    if sums != struct.unpack_from(">II", wal, 24):
        return True
    committed = True
    for at in range(_WAL_HEADER, len(wal) - 16, _FRAME_HEADER + size):
        if wal[at + 8 : at + 16] != salts:
            break  # an earlier round's: all of this one was read
        if at + _FRAME_HEADER + size > len(wal):
            return True
        committed = wal[at + 4 : at + 8] != bytes(4)
        page = wal[at + _FRAME_HEADER : at + _FRAME_HEADER + size]
        sums = _sums(wal[at : at + 8] + page, form, sums)
        if sums != struct.unpack_from(">II", wal, at + 16):
            return True
    return not committed


def _sums(data: bytes, form: str, sums: tuple[int, int]) -> tuple[int, int]:
    """SQLite's checksum of a log goes on from frame to frame."""
    a, b = sums
    words = struct.unpack(f"{form}{len(data) // 4}I", data)
    for n in range(0, len(words), 2):
        a = (a + words[n] + b) & 0xFFFFFFFF
        b = (b + words[n + 1] + a) & 0xFFFFFFFF
    return a, b


def _cells(number: int, page: bytes, pages: dict[int, bytes], size: int) -> Iterator[bytes]:
    """The rows in the cells of a leaf page."""
    head = _FIRST_PAGE_HEADER if number == 1 else 0
    if len(page) < size or page[head] != _LEAF:
        return
    (count,) = struct.unpack_from(">H", page, head + 3)
    for n in range(min(count, (size - head - 8) // 2)):
        (at,) = struct.unpack_from(">H", page, head + 8 + 2 * n)
        try:
            yield _row_of_cell(page, at, pages, size)
        except (IndexError, struct.error, ValueError):
            continue


def _row_of_cell(page: bytes, at: int, pages: dict[int, bytes], size: int) -> bytes:
    """Cell: payload size, rowid, payload (the rest of it in a chain of overflow pages)."""
    length, at = _varint(page, at)
    _, at = _varint(page, at)
    if not 0 < length <= MOST_ROW_BYTES:
        raise ValueError("no payload is so long")
    most = size - 35
    local = length
    if length > most:
        least = (size - 12) * 32 // 255 - 23
        local = least + (length - least) % (size - 4)
        local = local if local <= most else least
    payload = page[at : at + local]
    if length > local:
        (following,) = struct.unpack_from(">I", page, at + local)
        pieces, missing = [payload], length - local
        while missing > 0:
            more = pages.get(following, b"")
            if len(more) < size:
                raise ValueError("a page is missing")
            (following,) = struct.unpack_from(">I", more, 0)
            pieces.append(more[4 : 4 + min(missing, size - 4)])
            missing -= size - 4
        payload = b"".join(pieces)
    return _last_column(payload)


def _last_column(payload: bytes) -> bytes:
    """The blob at the end of a record (pid, ended, row)."""
    header, at = _varint(payload, 0)
    kind = 0
    while at < header:
        kind, at = _varint(payload, at)
    if kind < 12 or kind % 2:
        raise ValueError("it is no blob")
    blob = payload[len(payload) - (kind - 12) // 2 :]
    if not blob:
        raise ValueError("it is empty")
    return blob


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for n in range(9):
        byte = data[at + n]
        if n == 8:
            return value << 8 | byte, at + 9
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + n + 1
    raise ValueError("no varint")


def _signed(data: bytes) -> Iterator[bytes]:
    """Whatever begins as a row does: a row says by itself where it ends."""
    at = data.find(SIGNATURE)
    while at >= 0:
        unpacker = msgpack.Unpacker(max_buffer_size=MOST_ROW_BYTES)
        unpacker.feed(data[at : at + MOST_ROW_BYTES][: 1 << 20])
        try:
            unpacker.skip()
            yield data[at : at + unpacker.tell()]
        except Exception:  # noqa: BLE001  msgpack raises a dozen kinds; it is none
            pass
        at = data.find(SIGNATURE, at + 1)
