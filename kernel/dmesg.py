"""The kernel's own log, structured: what it did, about whom, and what set it off.

A cause is what came from outside: a call, a worker that said or did something by itself, a moment
that had come. It has a number, and everything that follows from it bears that number: the hold of
one process, the start of another, the error of a third. The line that names the cause is written
when the first thing follows from it.

The newest lines are in memory; all but leases (`debug`) are also in `dmesg.jsonl` of the home,
where the next kernel finds them. They are not synced: a power cut may cost the last seconds.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# How many lines are kept in memory, and how large a file may grow before it becomes `.1`.
LINES = 20_000
FILE_BYTES = 8 * 1024 * 1024

# What is written goes to the file so much later at most: many lines, one write.
FLUSH_S = 0.2

# Lines that an earlier kernel may have shown and not written: those of a flush, and leases.
GAP = 10_000

LEVELS = ("debug", "info", "warning", "error")
_DEBUG = frozenset({"granted", "held", "preempted", "packed"})
_WARNING = frozenset(
    {"backoff", "hung", "killed", "policy-failed", "move-failed", "out-of-memory", "outgrown",
     "worker-died", "nonsense"}
)  # fmt: skip

Line = dict[str, Any]
_PLAIN: Line = {"pid": None, "why": "", "by": None, "cause": None, "root": False}


@dataclass(slots=True)
class Cause:
    """Something from outside. Without `what` nothing is known that could be told."""

    number: int
    what: str
    why: str = ""
    pid: int = 0
    told: bool = False


class Dmesg:
    def __init__(self, path: Path, now: Callable[[], float]) -> None:
        self._path, self._now = path, now
        self.lines: collections.deque[Line] = collections.deque(maxlen=LINES)
        self.seq = 0
        self.failed = ""
        self._causes = 0
        self._current: ContextVar[Cause | None] = ContextVar("cause", default=None)
        self._unwritten: list[str] = []
        self._flusher: asyncio.TimerHandle | None = None
        self._grown: set[asyncio.Future[None]] = set()

    def open(self) -> str:
        """Take up where an earlier kernel ended -> what its last line was about; empty: none."""
        for line in self._read():
            self.lines.append(line)
            self.seq = max(self.seq, int(line["seq"]))
            self._causes = max(self._causes, int(line.get("cause") or 0))
        if not self.lines:
            return ""
        # Whoever followed has seen lines of it that are in no file: numbers begin behind them.
        self.seq = (self.seq // GAP + 2) * GAP
        return str(self.lines[-1]["what"])

    def close(self) -> None:
        if self._flusher is not None:
            self._flusher.cancel()
        self._flush()

    # ---- causes ----

    def cause(self, what: str, why: str = "", pid: int = 0) -> Cause:
        self._causes += 1
        return Cause(self._causes, what, why, pid)

    def current(self) -> Cause | None:
        return self._current.get()

    @contextlib.contextmanager
    def because(self, cause: Cause | None) -> Iterator[None]:
        """What is written inside follows from `cause`; so does what tasks begun inside write."""
        token = self._current.set(cause)
        try:
            yield
        finally:
            self._current.reset(token)

    # ---- lines ----

    def write(self, what: str, pid: int = 0, why: str = "", by: int = 0, level: str = "") -> None:
        cause = self._current.get()
        if cause is not None and cause.what and not cause.told:
            cause.told = True
            self._add(cause.what, cause.pid, cause.why, 0, "info", cause.number, root=True)
        level = level or level_of(what, why)
        self._add(what, pid, why, by, level, cause.number if cause else 0)

    def _add(
        self, what: str, pid: int, why: str, by: int, level: str, cause: int, root: bool = False
    ) -> None:
        self.seq += 1
        line = {
            "seq": self.seq, "at": self._now(), "level": level, "what": what, "pid": pid or None,
            "why": why, "by": by or None, "cause": cause or None, "root": root,
        }  # fmt: skip
        self.lines.append(line)
        if level != "debug":
            self._unwritten.append(json.dumps(line))
            if self._flusher is None:
                loop = asyncio.get_running_loop()
                self._flusher = loop.call_later(FLUSH_S, self._flush)
        for future in self._grown:
            if not future.done():
                future.set_result(None)
        self._grown.clear()

    async def grown(self) -> None:
        """Wait for the next line."""
        future = asyncio.get_running_loop().create_future()
        self._grown.add(future)
        await future

    def select(
        self, since: int = 0, pid: int = 0, cause: int = 0, level: str = "debug"
    ) -> list[Line]:
        """Lines after number `since`, about a process, of a cause, of a level and above."""
        least = LEVELS.index(level)
        return [
            line
            for line in self.lines
            if line["seq"] > since
            and (not pid or pid in (line["pid"], line["by"]))
            and (not cause or line["cause"] == cause)
            and LEVELS.index(line["level"]) >= least
        ]

    def causes_of(self, lines: list[Line]) -> dict[int, str]:
        """What the causes of some lines were, by number."""
        wanted = {line["cause"] for line in lines if line["cause"]}
        found: dict[int, str] = {}
        for line in self.lines:
            number = line["cause"]
            if number in wanted and line["root"]:
                found[number] = f"{line['what']}: {line['why']}" if line["why"] else line["what"]
        return found

    # ---- the file ----

    def _flush(self) -> None:
        self._flusher = None
        text, self._unwritten = "".join(f"{line}\n" for line in self._unwritten), []
        if not text:
            return
        try:
            with self._path.open("a") as file:
                file.write(text)
                size = file.tell()
            if size > FILE_BYTES:
                self._path.replace(self._path.with_suffix(".jsonl.1"))
            self.failed = ""
        except OSError as exc:
            self.failed = f"{self._path}: {exc.strerror or exc}"

    def _read(self) -> Iterator[Line]:
        for path in (self._path.with_suffix(".jsonl.1"), self._path):
            with contextlib.suppress(OSError):
                for text in path.read_text(errors="replace").splitlines():
                    with contextlib.suppress(ValueError, KeyError, TypeError):
                        line = json.loads(text)
                        if isinstance(line, dict) and line["level"] in LEVELS and line["what"]:
                            yield {**_PLAIN, **line}


def level_of(what: str, why: str) -> str:
    failed = what == "exited" and not why.startswith("status 0") and "killed by" not in why
    return "debug" if what in _DEBUG else "warning" if failed or what in _WARNING else "info"
