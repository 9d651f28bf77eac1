"""Traces that say how much work a job is, beside files that say how fast it goes: Gavel, Pollux."""

from __future__ import annotations

import csv
import json
from bisect import bisect_left
from pathlib import Path

from llmos.kernel.errors import BadInput, NoSuchThing
from llmos.kernel.sim.jobs import SimJob, Trace
from llmos.kernel.sim.traces.clusters import gang_of
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
    open_source,
    positive,
)

THROUGHPUTS = "simulation_throughputs.json"

# What a Pollux application is until it is done, in samples. The workloads name no work: these are
# our estimates, from the data sets that the paper names (OSDI 2021, table 1) and usual epochs.
POLLUX_SAMPLES = {
    "bert": 2 * 88_000.0,  # SQuAD
    "cifar10": 100 * 50_000.0,
    "deepspeech2": 80 * 4_000.0,  # CMU-ARCTIC
    "imagenet": 90 * 1_281_167.0,
    "ncf": 10 * 5_000_000.0,  # MovieLens with negatives
    "yolov3": 50 * 16_551.0,  # PASCAL VOC
}


# ---- gavel ----


def gavel(source: Source, options: ReadOptions) -> Trace:
    """Raises BadInput without a file of throughputs, NoSuchThing for an unknown GPU."""
    speeds = _throughputs(source, options)

    def job(cells: list[str]) -> SimJob:
        if len(cells) not in (7, 10):
            raise RowError(f"{len(cells)} columns, neither 7 nor 10")
        # 7: ..., steps, arrival, GPUs; 10: ..., steps, GPUs, weight, SLO, arrival
        steps, gpus, at = (cells[i] for i in ((4, 6, 5) if len(cells) == 7 else (5, 6, 9)))
        gang = gang_of(gpus)
        speed = speeds.get((cells[0], gang), 0.0)
        if speed <= 0:
            raise LeftOut(f"no throughput is known on {options.gpu}")
        seconds = positive(number_of(steps, "total_steps") / speed, "total_steps")
        arrival = number_of(at, "arrival_time")
        return SimJob(arrival, seconds, gang, program=cells[0], step_s=1 / speed)

    return collect(source, "gavel", source.columns(), job)


def _throughputs(source: Source, options: ReadOptions) -> dict[tuple[str, int], float]:
    """(model, GPUs) -> steps per second alone."""
    path = Path(options.throughputs) if options.throughputs else source.beside(THROUGHPUTS)
    if path is None:
        raise BadInput(
            f"{source.path} counts steps, and says not how long one takes",
            f"put {THROUGHPUTS} beside it, or name it with --throughputs",
        )
    try:
        table = json.loads("\n".join(open_source(path).lines))
        gpus = sorted(table)
        rows = table.get(options.gpu)
        if rows is None:
            raise NoSuchThing(
                f"{path} has no GPU {options.gpu!r}", f"--gpu is one of {', '.join(gpus)}"
            )
        return {_model_of(key): float(row["null"]) for key, row in rows.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(f"{path} is no table of throughputs") from None


def _model_of(key: str) -> tuple[str, int]:
    """`('ResNet-18 (batch size 16)', 1)` -> its two parts."""
    name, _, gpus = key.strip("()").rpartition(", ")
    return name.strip("'"), int(gpus)


# ---- pollux ----


def pollux(source: Source, _: ReadOptions) -> Trace:
    """A job runs `samples / batch_size` steps; the profiles beside it say how long one takes."""
    profiles: dict[str, dict[int, list[tuple[float, float]]] | None] = {}

    def job(row: Row) -> SimJob:
        application = cell(row, "application")
        if application not in profiles:
            profiles[application] = _profile(source, application)
        profile = profiles[application]
        if profile is None or application not in POLLUX_SAMPLES:
            raise LeftOut(f"there is no profile of {application}")
        replicas, batch = count(row, "num_replicas"), count(row, "batch_size")
        step_s = _step_s(profile, replicas, batch / replicas)
        steps = POLLUX_SAMPLES[application] / batch
        at = number(row, "time")
        return SimJob(at, steps * step_s, replicas, program=application, step_s=step_s)

    return collect(source, "pollux", source.table(), job)


def _profile(source: Source, application: str) -> dict[int, list[tuple[float, float]]] | None:
    """replicas -> (local batch, seconds a step), sorted. The more consolidated placement counts."""
    found: dict[tuple[int, float], float] = {}
    files = [source.beside(f"profile_{application}_{k}.csv") for k in ("placements", "scalability")]
    for path in files:
        if path is None:
            return None
        for row in csv.DictReader(open_source(path).lines):
            try:
                replicas = int(row.get("num_replicas") or sum(map(int, row["placement"])))
                batch, step_s = float(row["local_bsz"]), float(row["step_time"])
            except (KeyError, TypeError, ValueError):
                raise BadInput(f"{path} is no profile: {row}") from None
            key = (replicas, batch)
            found[key] = min(step_s, found.get(key, step_s))
    profile: dict[int, list[tuple[float, float]]] = {}
    for (replicas, batch), step_s in sorted(found.items()):
        profile.setdefault(replicas, []).append((batch, step_s))
    return profile


def _step_s(
    profile: dict[int, list[tuple[float, float]]], replicas: int, local_batch: float
) -> float:
    """The nearest number of replicas, then a straight line between local batches. Beyond the
    largest that was measured a step is several, one after the other."""
    rows = profile[min(profile, key=lambda n: (abs(n - replicas), n))]
    largest, slowest = rows[-1]
    if local_batch >= largest:
        return slowest * local_batch / largest
    at = bisect_left(rows, (local_batch, 0.0))
    if at == 0:
        return rows[0][1]
    (b0, s0), (b1, s1) = rows[at - 1], rows[at]
    return s0 + (s1 - s0) * (local_batch - b0) / (b1 - b0)
