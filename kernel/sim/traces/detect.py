"""Which format a file has, by what is in it, and reading it."""

from __future__ import annotations

import json
from collections.abc import Callable

from llmos.kernel.errors import BadInput
from llmos.kernel.sim.jobs import Trace
from llmos.kernel.sim.traces import clusters, jitter, measured, plain, requests
from llmos.kernel.sim.traces.source import ReadOptions, Source, open_source

Reader = Callable[[Source, ReadOptions], Trace]

# By the columns that a header must have; the first that fits is taken.
BY_HEADER: tuple[tuple[frozenset[str], Reader], ...] = (
    (frozenset({"timestamp", "duration", "num_gpus", "cluster"}), clusters.philly),
    (frozenset({"job_id", "num_gpu", "submit_time", "duration"}), clusters.tiresias),
    (frozenset({"time", "application", "num_replicas", "batch_size"}), measured.pollux),
    (frozenset({"num_gpu", "gpu_milli", "qos", "creation_time"}), clusters.openb),
    (frozenset({"TIMESTAMP", "ContextTokens", "GeneratedTokens"}), requests.azure),
    (frozenset({"client", "t_s", "rate_rps", "family"}), requests.servegen),
    (frozenset({"num_prefill_tokens", "num_decode_tokens"}), requests.vidur),
    (frozenset({"submit_s", "duration_s"}), plain.plain),
)

BY_COLUMNS: dict[int, Reader] = {
    7: measured.gavel, 10: measured.gavel, 12: clusters.shockwave,
}  # fmt: skip

# Files that lie beside traces and are none.
NOT_TRACES: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset(jitter.COLUMNS), "step times: give it with --jitter"),
    (frozenset({"client", "t_s", "field", "p50"}), "token counts: give the rates beside it"),
)


def read_trace(path: str, options: ReadOptions) -> Trace:
    """Read a file of any known format. Raises BadInput when it is of none, or has no job."""
    source = open_source(path)
    trace = reader_of(source)(source, options)
    if not trace.jobs:
        first = f"; line {trace.broken[0].line}: {trace.broken[0].why}" if trace.broken else ""
        raise BadInput(f"{path} has no job that can be simulated{first}")
    return trace


def reader_of(source: Source) -> Reader:
    first = next((line for line in source.lines if line.strip()), "")
    if not first:
        raise BadInput(f"{source.path} is empty")
    header = frozenset(cell.strip() for cell in first.split(","))
    for columns, reader in BY_HEADER:
        if columns <= header:
            return reader
    for columns, what in NOT_TRACES:
        if columns <= header:
            raise BadInput(f"{source.path} is no trace: it has {what}")
    if first.startswith("{") and _is_request(first):
        return requests.mooncake
    if "\t" in first and len(first.split("\t")) in BY_COLUMNS:
        return BY_COLUMNS[len(first.split("\t"))]
    raise BadInput(
        f"{source.path} is no trace that llmos knows",
        "a CSV file with the columns submit_s and duration_s is one; docs/reference/traces.md "
        "has the others",
    )


def _is_request(line: str) -> bool:
    try:
        return {"timestamp", "input_length"} <= set(json.loads(line))
    except (ValueError, TypeError):
        return False
