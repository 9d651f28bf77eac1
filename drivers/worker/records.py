"""What the processes in a worker have said: a stream for each, and who has to hear of it.

A record is on the disk before anybody is told that there is one. What a full disk did not take is
tried again; who hears of an end finds all that was said before it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Protocol

from llmos.drivers.worker.stream import Stream

# Records that a full disk did not take are tried again after so long.
FLUSH_S = 0.5


class Post(Protocol):
    """Send a message to the kernel; with `keep` until it has acknowledged it."""

    def __call__(self, message: dict[str, Any], keep: bool = False) -> None: ...


class Records:
    def __init__(self, post: Post) -> None:
        self._post = post
        self._streams: dict[int, Stream] = {}  # by process
        self._marks: set[int] = set()  # whose readers have yet to hear of a record
        self._unsaid: dict[int, tuple[Stream, dict[str, Any]]] = {}  # ends that wait for the disk
        self._flushed_at = 0.0
        self.in_step = False  # one report tells of all that was said in it

    def open(self, pid: int, work: Path) -> None:
        """Go on with the stream of a process, behind what is there."""
        self._streams[pid] = Stream(work / "stream")

    def add(self, pid: int, kind: str, values: dict[str, Any]) -> None:
        """A process says something."""
        if pid not in self._streams:
            return  # a guest that was dropped in the middle of this step
        self._streams[pid].append(kind, values)
        if self.in_step:
            self._marks.add(pid)
        else:
            self._post({"k": "mark", "pid": pid})

    def progress(self, pid: int, values: dict[str, Any]) -> None:
        """A step is done; the report of it is about to tell."""
        self._streams[pid].append("progress", values)
        self._marks.add(pid)

    def take_marks(self) -> list[int]:
        """Who is named in a report: their readers hear of it by that."""
        marks = list(self._marks)
        self._marks.clear()
        return marks

    def tell_marks(self, *pids: int) -> None:
        """Readers must have heard of the last record before they hear of the end."""
        for pid in pids or tuple(self._marks):
            self._marks.discard(pid)
            self._post({"k": "mark", "pid": pid})

    # ---- ends ----

    @property
    def unsaid(self) -> list[int]:
        """Whose end nobody has heard of yet: it waits for the disk."""
        return list(self._unsaid)

    def put_off(self, pid: int, done: dict[str, Any]) -> None:
        """Keep the end of a guest until the disk has taken all that it said, if it has not now."""
        stream = self._streams.get(pid)
        if stream is not None and stream.behind and not stream.flush():
            # Who hears of the end must find all that was said before it.
            del self._streams[pid]
            self._unsaid[pid] = (stream, done)

    def end(self, pid: int, done: dict[str, Any]) -> None:
        """A guest has ended: nothing more comes of it. Tells its end, unless that is put off."""
        stream = self._streams.pop(pid, None)
        if stream is not None:
            stream.close()
        self.tell_marks(pid)
        if pid not in self._unsaid:
            self._post(done, keep=True)

    def forget(self, pid: int) -> None:
        """Nobody wants to hear of it any more."""
        stream = self._streams.pop(pid, None)
        if stream is not None:
            stream.close()
        self._unsaid.pop(pid, None)

    # ---- a disk that is full ----

    @property
    def behind(self) -> bool:
        return bool(self._unsaid) or any(stream.behind for stream in self._streams.values())

    def flush(self) -> bool:
        """-> whether the disk has all that was said in the open streams."""
        return all(stream.flush() for stream in self._streams.values())

    def retry(self) -> None:
        """Try again what the disk did not take; readers and the kernel hear of it then."""
        now = time.monotonic()
        if not self.behind or now - self._flushed_at < FLUSH_S:
            return
        self._flushed_at = now
        for pid, stream in self._streams.items():
            if stream.behind and stream.flush():
                self._post({"k": "mark", "pid": pid})
        for pid, (stream, done) in list(self._unsaid.items()):
            if stream.flush():
                del self._unsaid[pid]
                stream.close()
                self._post({"k": "mark", "pid": pid})
                self._post(done, keep=True)
