"""A trace file as lines, plain or compressed, and the numbers in its rows.

`collect` is how every reader goes through its rows: a row that raises RowError is kept as broken,
with its line, and the rest is used.
"""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from llmos.kernel.errors import BadInput
from llmos.kernel.sim.jobs import Broken, SimJob, Trace

Row = Mapping[str, str]
T = TypeVar("T")


class RowError(Exception):
    """What is wrong with one row, in words."""


class LeftOut(Exception):
    """Why a good row is not simulated, in words."""


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What a reader may be told. Rates are tokens per second of one device, all requests
    together; docs/reference/traces.md has the reasons for the defaults."""

    cluster: str = ""  # philly: only this virtual cluster
    throughputs: str = ""  # gavel: the file of measured steps per second
    gpu: str = "v100"  # gavel: whose throughputs
    tokens: str = ""  # servegen: the file of token quantiles
    prefill_rate: float = 20_000.0
    decode_rate: float = 2_000.0
    kv_bytes: int = 128 * 1024  # per token
    weights_bytes: int = 0  # of the model that all requests share
    requests_per_s: float = 1.0  # where a trace has no arrival times
    limit: int = 0  # 0: all
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Source:
    """A text file in memory: `lines` without their ends, numbered from 1."""

    path: Path
    lines: list[str]

    def beside(self, name: str) -> Path | None:
        """A file of that name in the same folder, also compressed; None when there is none."""
        for candidate in (self.path.with_name(name), self.path.with_name(f"{name}.gz")):
            if candidate.is_file():
                return candidate
        return None

    def table(self) -> Iterator[tuple[int, Row]]:
        """The rows of a CSV file with a header -> (line, row)."""
        reader = csv.DictReader(self.lines, restval="", restkey="")
        for row in reader:
            yield reader.line_num, row

    def columns(self) -> Iterator[tuple[int, list[str]]]:
        """Tab-separated rows -> (line, cells)."""
        for number, line in enumerate(self.lines, 1):
            if line.strip():
                yield number, line.split("\t")


def open_source(path: str | Path) -> Source:
    """Read a file. Raises BadInput when it cannot be read as text."""
    path = Path(path)
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    except OSError as exc:
        raise BadInput(f"cannot read {path}: {exc.strerror or exc}") from None
    except (EOFError, zlib.error):
        raise BadInput(f"{path} is compressed, and damaged") from None
    except UnicodeDecodeError:
        raise BadInput(
            f"{path} is not text", "a trace is CSV, tab-separated or JSON lines"
        ) from None
    return Source(path, text.splitlines())


def collect(
    source: Source, kind: str, rows: Iterable[tuple[int, T]], read: Callable[[T], SimJob]
) -> Trace:
    """Read every row into a trace; what is wrong with a row is kept, not raised."""
    trace = Trace(str(source.path), kind)
    for line, row in rows:
        try:
            trace.jobs.append(read(row))
        except RowError as exc:
            trace.broken.append(Broken(line, str(exc)))
        except LeftOut as exc:
            trace.left_out[str(exc)] += 1
    return trace


def cell(row: Row, name: str) -> str:
    """Raises RowError when there is none."""
    value = row.get(name, "")
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{name} is missing")
    return value.strip()


def number(row: Row, name: str, low: float = 0.0, default: float | None = None) -> float:
    """A finite number of at least `low`. Raises RowError."""
    if default is not None and not (row.get(name) or "").strip():
        return default
    return number_of(cell(row, name), name, low)


def number_of(text: str, name: str, low: float = 0.0) -> float:
    try:
        value = float(text)
    except ValueError:
        raise RowError(f"{name} is {text!r}, not a number") from None
    if not math.isfinite(value) or value < low:
        raise RowError(f"{name} is {text}, below {low:g}" if value < low else f"{name} is {text}")
    return value


def count(row: Row, name: str, low: int = 1, default: int | None = None) -> int:
    """A whole number of at least `low`. Raises RowError."""
    value = number(row, name, low, default)
    if value != int(value):
        raise RowError(f"{name} is {value:g}, not a whole number")
    return int(value)


def positive(value: float, name: str) -> float:
    """Raises RowError for zero: a job that takes no time is not one."""
    if value <= 0:
        raise RowError(f"{name} is {value:g}")
    return value
