"""A trace of one's own: a CSV file with a header, one job a row.

    submit_s,duration_s,devices,memory,class,nice,user,program,step_s

Only the first two are needed.
"""

from __future__ import annotations

from llmos.kernel.errors import BadArgument
from llmos.kernel.process import CLASSES
from llmos.kernel.sim.jobs import SimJob, Trace
from llmos.kernel.sim.traces.source import (
    ReadOptions,
    Row,
    RowError,
    Source,
    collect,
    count,
    number,
    positive,
)
from llmos.kernel.units import parse_bytes

COLUMNS = ("submit_s", "duration_s", "devices", "memory", "class", "nice", "user", "program",
           "step_s")  # fmt: skip


def plain(source: Source, _: ReadOptions) -> Trace:
    """Raises BadArgument for a column that is not one of ours: it may be a misspelled one."""
    header = source.lines[0].split(",") if source.lines else []
    unknown = [name for name in header if name.strip() not in COLUMNS]
    if unknown:
        raise BadArgument(
            f"{source.path} has a column {unknown[0].strip()!r}",
            f"the columns are {', '.join(COLUMNS)}",
        )
    return collect(source, "csv", source.table(), _job)


def _job(row: Row) -> SimJob:
    def text(name: str, default: str) -> str:
        return (row.get(name) or "").strip() or default

    cls, memory = text("class", "batch"), text("memory", "0")
    if cls not in CLASSES:
        raise RowError(f"class is {cls!r}, not one of {', '.join(CLASSES)}")
    nice = number(row, "nice", -20, 0)
    if nice > 19 or nice != int(nice):
        raise RowError(f"nice is {nice:g}, not a whole number from -20 to 19")
    try:
        nbytes = parse_bytes(memory)
    except BadArgument as exc:
        raise RowError(f"memory: {exc.message}") from None
    return SimJob(
        number(row, "submit_s"), positive(number(row, "duration_s"), "duration_s"),
        count(row, "devices", default=1), nbytes, cls=CLASSES[cls], nice=int(nice),
        user=text("user", "user"), program=text("program", "job"),
        step_s=number(row, "step_s", default=0),
    )  # fmt: skip
