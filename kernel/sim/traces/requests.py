"""Traces of requests to a language model: Azure, Mooncake, ServeGen, vidur.

A request becomes an interactive process that needs its device for

    prompt tokens / prefill rate + answer tokens / decode rate    seconds

where both rates are of a whole device that serves many at once. It holds its KV, and shares the
weights of the model with all others. That leaves out what batching does to a single request: the
figures are good for load and waiting, not for the gap between two tokens.
"""

from __future__ import annotations

import datetime
import json
import random
from bisect import bisect_right
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from llmos.kernel.errors import BadInput
from llmos.kernel.process import Class
from llmos.kernel.sim.jobs import SimJob, Trace
from llmos.kernel.sim.traces.source import (
    ReadOptions,
    Row,
    RowError,
    Source,
    cell,
    collect,
    count,
    number,
    open_source,
    positive,
)

# ServeGen describes far more requests than anybody wants to simulate.
SERVEGEN_LIMIT = 20_000

WINDOW_S = 600.0

Rates = list[tuple[float, str, float, str, float]]  # start, client, per second, family, shape


def request(at: float, prompt: float, answer: float, o: ReadOptions, user: str = "user") -> SimJob:
    seconds = prompt / o.prefill_rate + answer / o.decode_rate
    tokens = max(1, round(prompt + answer))
    return SimJob(
        at, positive(seconds, "the number of tokens"), memory_bytes=tokens * o.kv_bytes,
        cls=Class.INTERACTIVE, user=user, program="infer", model="model",
        shared_bytes=o.weights_bytes,
    )  # fmt: skip


def azure(source: Source, options: ReadOptions) -> Trace:
    def job(row: Row) -> SimJob:
        text = cell(row, "TIMESTAMP")
        try:
            seconds, _, fraction = text.partition(".")
            at = datetime.datetime.fromisoformat(seconds).replace(tzinfo=datetime.UTC).timestamp()
            at += float(f"0.{fraction or 0}")
        except ValueError:
            raise RowError(f"TIMESTAMP is {text!r}, not a time") from None
        return request(
            at, count(row, "ContextTokens", 0), count(row, "GeneratedTokens", 0), options
        )

    return collect(source, "azure", source.table(), job)


def mooncake(source: Source, options: ReadOptions) -> Trace:
    def job(line: str) -> SimJob:
        try:
            row = json.loads(line)
            at, prompt, answer = (
                float(row[k]) for k in ("timestamp", "input_length", "output_length")
            )
        except (ValueError, KeyError, TypeError):
            raise RowError("not a request with timestamp, input_length, output_length") from None
        if min(at, prompt, answer) < 0:
            raise RowError("a number is below 0")
        return request(at / 1000, prompt, answer, options)

    lines = ((n, line) for n, line in enumerate(source.lines, 1) if line.strip())
    return collect(source, "mooncake", lines, job)


def vidur(source: Source, options: ReadOptions) -> Trace:
    """There are no arrival times: they are drawn, `requests_per_s` on average (Poisson)."""
    rng = random.Random(options.seed)
    clock = 0.0

    def job(row: Row) -> SimJob:
        nonlocal clock
        prompt, answer = count(row, "num_prefill_tokens", 0), count(row, "num_decode_tokens", 0)
        clock += rng.expovariate(options.requests_per_s)
        return request(clock, prompt, answer, options)

    return collect(source, "vidur", source.table(), job)


# ---- servegen: clients with rates and token quantiles, from which requests are drawn ----


def servegen(source: Source, options: ReadOptions) -> Trace:
    """Raises BadInput without the file of token quantiles."""
    trace = collect(source, "servegen", source.table(), _window_checked)
    broken = {b.line for b in trace.broken}
    windows = sorted(_window(row) for line, row in source.table() if line not in broken)
    tokens = _Tokens(source, options)
    wanted = options.limit or SERVEGEN_LIMIT
    drawn = islice(_draw(windows, tokens, options), wanted + 1)
    trace.jobs = list(drawn)
    if len(trace.jobs) > wanted:
        trace.left_out[f"after the first {wanted:,} (--limit)"] += 1
        trace.jobs.pop()
    return trace


def _window(row: Row) -> tuple[float, str, float, str, float]:
    family = cell(row, "family")
    if family not in ("Gamma", "Weibull"):
        raise RowError(f"family is {family!r}, neither Gamma nor Weibull")
    rate = positive(number(row, "rate_rps"), "rate_rps")
    shape = positive(number(row, "p1"), "p1")
    return number(row, "t_s"), cell(row, "client"), rate, family, shape


def _window_checked(row: Row) -> SimJob:
    """`collect` wants a job of each row; those of servegen are drawn later, from all windows."""
    return SimJob(_window(row)[0], WINDOW_S)


def _draw(windows: Rates, tokens: _Tokens, options: ReadOptions) -> Iterator[SimJob]:
    """Requests in order of time, window by window."""
    rng = random.Random(options.seed)
    at = 0
    while at < len(windows):
        start = windows[at][0]
        arrivals: list[tuple[float, str]] = []
        while at < len(windows) and windows[at][0] == start:
            _, client, rate, family, shape = windows[at]
            arrivals += [(t, client) for t in _arrivals(rng, start, rate, family, shape)]
            at += 1
        for when, client in sorted(arrivals):
            prompt, answer = tokens.draw(rng, client, when)
            yield request(when, max(prompt, 1.0), answer, options, f"client-{client}")


def _arrivals(
    rng: random.Random, start: float, rate: float, family: str, shape: float
) -> Iterator[float]:
    """Arrival times of one client in one window; the mean gap is 1/rate whatever the shape."""
    draw = rng.gammavariate if family == "Gamma" else lambda k, scale: rng.weibullvariate(scale, k)
    mean = shape if family == "Gamma" else _weibull_mean(shape)
    clock = start + rng.random() / rate
    while clock < start + WINDOW_S:
        yield clock
        clock += draw(shape, 1.0) / mean / rate


def _weibull_mean(shape: float) -> float:
    from math import gamma

    return gamma(1 + 1 / shape)


class _Tokens:
    """Quantiles of prompt and answer lengths by client and time."""

    FIELDS = ("input_tokens", "output_tokens")
    POINTS = (0.1, 0.5, 0.9, 0.99)

    def __init__(self, source: Source, options: ReadOptions) -> None:
        name = source.path.name.removesuffix(".gz").replace("_rates", "_tokens")
        path = Path(options.tokens) if options.tokens else source.beside(name)
        if path is None or path == source.path:
            raise BadInput(
                f"{source.path} has rates, and no token counts",
                "put the table of tokens beside it, or name it with --tokens",
            )
        self._rows: dict[tuple[str, str], list[tuple[float, tuple[float, ...]]]] = {}
        for _, row in open_source(path).table():
            try:
                points = tuple(number(row, f"p{round(100 * p)}") for p in self.POINTS)
                key = (cell(row, "client"), cell(row, "field"))
                self._rows.setdefault(key, []).append((number(row, "t_s"), points))
            except RowError as exc:
                raise BadInput(f"{path} is no table of tokens: {exc}") from None
        for rows in self._rows.values():
            rows.sort()
        if not all(any(f == field for _, f in self._rows) for field in self.FIELDS):
            raise BadInput(f"{path} has no {' and '.join(self.FIELDS)}")
        self._clients = sorted({c for c, _ in self._rows})

    def draw(self, rng: random.Random, client: str, at: float) -> tuple[float, float]:
        """-> prompt and answer tokens. A client without a table takes that of another."""
        if any((client, field) not in self._rows for field in self.FIELDS):
            client = self._clients[hash_of(client) % len(self._clients)]
        prompt, answer = (self._one(rng, client, field, at) for field in self.FIELDS)
        return prompt, answer

    def _one(self, rng: random.Random, client: str, field: str, at: float) -> float:
        rows = self._rows.get((client, field))
        if rows is None:
            rows = next(r for (_, f), r in self._rows.items() if f == field)
        points = rows[max(0, bisect_right(rows, (at, (float("inf"),))) - 1)][1]
        return float(round(quantile(rng.random(), self.POINTS, points)))


def hash_of(text: str) -> int:
    """The same in every run, unlike `hash`."""
    return sum(ord(c) * 31**i for i, c in enumerate(text))


def quantile(u: float, at: tuple[float, ...], values: tuple[float, ...]) -> float:
    """Straight lines between quantiles; below the first and above the last: that value."""
    if u <= at[0]:
        return values[0]
    for k in range(1, len(at)):
        if u <= at[k]:
            part = (u - at[k - 1]) / (at[k] - at[k - 1])
            return values[k - 1] + part * (values[k] - values[k - 1])
    return values[-1]
