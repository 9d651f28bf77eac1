"""Traces of clusters: Philly, Tiresias, Shockwave and Alibaba's GPU sharing.

Each reader takes a source and the options, and gives a trace. The columns are described in
docs/reference/traces.md.
"""

from __future__ import annotations

import datetime

from llmos.kernel.errors import NoSuchThing
from llmos.kernel.process import Class
from llmos.kernel.sim.jobs import SimJob, Trace
from llmos.kernel.sim.traces.source import (
    LeftOut,
    ReadOptions,
    Row,
    RowError,
    Source,
    cell,
    collect,
    count,
    number,
    number_of,
    positive,
)

OPENB_CLASSES = {"LS": Class.INTERACTIVE, "BE": Class.BATCH, "Burstable": Class.BATCH,
                 "Guaranteed": Class.BATCH}  # fmt: skip


def philly(source: Source, options: ReadOptions) -> Trace:
    """Microsoft Philly, as adaptdl derived it. Raises NoSuchThing for an unknown cluster."""
    rows = list(source.table())
    clusters = {row.get("cluster", "") for _, row in rows}
    if options.cluster:
        if options.cluster not in clusters:
            raise NoSuchThing(
                f"there is no cluster {options.cluster!r} in {source.path}",
                f"it has {', '.join(sorted(c for c in clusters if c))}",
            )
        rows = [(line, row) for line, row in rows if row.get("cluster") == options.cluster]
    return collect(source, "philly", rows, _philly_job)


def _philly_job(row: Row) -> SimJob:
    text = cell(row, "timestamp")
    try:
        # Local time without a zone: only differences count, so any zone does.
        at = datetime.datetime.fromisoformat(text).replace(tzinfo=datetime.UTC)
    except ValueError:
        raise RowError(f"timestamp is {text!r}, not a time") from None
    duration = number(row, "duration")
    if not duration:
        raise LeftOut("never ran")
    return SimJob(at.timestamp(), duration, count(row, "num_gpus"), user=cell(row, "cluster"))


def tiresias(source: Source, _: ReadOptions) -> Trace:
    return collect(source, "tiresias", source.table(), _tiresias_job)


def _tiresias_job(row: Row) -> SimJob:
    duration = positive(number(row, "duration"), "duration")
    program = (row.get("model_name") or "job").strip()
    return SimJob(number(row, "submit_time"), duration, count(row, "num_gpu"), program=program)


def shockwave(source: Source, _: ReadOptions) -> Trace:
    return collect(source, "shockwave", source.columns(), _shockwave_job)


def _shockwave_job(cells: list[str]) -> SimJob:
    """job_type, command, folder, argument, data, steps, GPUs, mode, weight, SLO, seconds,
    arrival"""
    if len(cells) != 12:
        raise RowError(f"{len(cells)} columns, not 12")
    duration = positive(number_of(cells[10], "duration"), "duration")
    steps = number_of(cells[5], "total_steps")
    return SimJob(
        number_of(cells[11], "arrival_time"), duration, gang_of(cells[6]),
        program=cells[0], step_s=duration / steps if steps else 0.0,
    )  # fmt: skip


def gang_of(text: str) -> int:
    value = number_of(text, "scale_factor", 1)
    if value != int(value):
        raise RowError(f"scale_factor is {text}, not a whole number")
    return int(value)


def openb(source: Source, _: ReadOptions) -> Trace:
    """Pods that share GPUs. A pod that asks for a part of a GPU holds that part of its memory,
    and needs that part of its time: its lifetime times the part, in device-seconds."""
    return collect(source, "openb", source.table(), _openb_job)


def _openb_job(row: Row) -> SimJob:
    if not count(row, "num_gpu", 0):
        raise LeftOut("wants no GPU")
    if not (row.get("scheduled_time") or "").strip():
        raise LeftOut("was never scheduled")
    share = number(row, "gpu_milli") / 1000
    if not 0 < share <= 1:
        raise RowError(f"gpu_milli is {row['gpu_milli']}, not 1 to 1000")
    lived = number(row, "deletion_time") - number(row, "scheduled_time")
    if lived <= 0:
        raise LeftOut("ended as it was scheduled")
    qos = cell(row, "qos")
    if qos not in OPENB_CLASSES:
        raise RowError(f"qos is {qos!r}")
    return SimJob(
        number(row, "creation_time"), lived * share, count(row, "num_gpu"), memory_share=share,
        cls=OPENB_CLASSES[qos], program=(row.get("gpu_spec") or "pod").strip() or "pod",
    )  # fmt: skip
