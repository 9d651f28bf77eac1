"""What a simulation says: the figures of each policy, as a table and as CSV.

The finish-time ratio of a job is how long it took over how long it would have taken with its equal
share of the devices (Themis, NSDI 2020; with the contention factor of Shockwave, NSDI 2023):

    ratio = (finish - submit) / (duration x max(1, contention))

where contention is the mean, over the job's life, of the devices that all live jobs want over the
devices there are. Above 1 a job fared worse than with its share: it counts as unfair.
"""

from __future__ import annotations

import csv
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from llmos.kernel.errors import BadInput
from llmos.kernel.sim.world import Outcome, Run


@dataclass(frozen=True, slots=True)
class Figures:
    """Seconds, but for shares (0 to 1) and counts. `utilisation` is of the whole makespan."""

    policy: str
    jobs: int
    refused: int
    jct_mean_s: float
    jct_median_s: float
    jct_p99_s: float
    wait_mean_s: float
    makespan_s: float
    utilisation: float
    preemptions: int
    moves: int
    ratio_worst: float
    unfair_share: float
    ratio_above_1_2_share: float


def figures(policy: str, outcome: Outcome) -> Figures:
    """`outcome` has at least one job that ran."""
    done = [r for r in outcome.runs if r.ended_at is not None]
    times = sorted(jct(r) for r in done)
    ratios = finish_time_ratios(done, outcome.devices)
    capacity = outcome.devices * outcome.makespan_s
    n = len(done)
    return Figures(
        policy, n, len(outcome.runs) - n,
        jct_mean_s=math.fsum(times) / n, jct_median_s=times[n // 2],
        jct_p99_s=times[min(n - 1, int(0.99 * n))],
        wait_mean_s=math.fsum(jct(r) - r.ran_s for r in done) / n,
        makespan_s=outcome.makespan_s, utilisation=outcome.busy_s / capacity,
        preemptions=sum(r.holds + r.moves for r in done), moves=sum(r.moves for r in done),
        ratio_worst=max(ratios),
        unfair_share=sum(r > 1 + 1e-9 for r in ratios) / n,
        ratio_above_1_2_share=sum(r > 1.2 for r in ratios) / n,
    )  # fmt: skip


def jct(run: Run) -> float:
    """Job completion time, in seconds."""
    assert run.ended_at is not None
    return run.ended_at - run.job.submit_s


def finish_time_ratios(done: Sequence[Run], devices: int) -> list[float]:
    """One for each run, in their order."""
    changes: list[tuple[float, int]] = []
    for run in done:
        assert run.ended_at is not None
        changes += [(run.job.submit_s, run.job.devices), (run.ended_at, -run.job.devices)]
    changes.sort()
    times, sums, rates = [0.0], [0.0], [1.0]  # the contention until then, and from then on
    wanted = 0
    for at, change in changes:
        sums.append(sums[-1] + rates[-1] * (at - times[-1]))
        wanted += change
        times.append(at)
        rates.append(max(1.0, wanted / devices))

    def until(at: float) -> float:
        k = bisect_right(times, at) - 1
        return sums[k] + rates[k] * (at - times[k])

    found = []
    for run in done:
        assert run.ended_at is not None
        lived = jct(run)
        contention = (until(run.ended_at) - until(run.job.submit_s)) / lived
        found.append(lived / (run.job.duration_s * max(1.0, contention)))
    return found


Show = Callable[[Figures], str]

_COLUMNS: tuple[tuple[str, Show], ...] = (
    ("policy", lambda f: f.policy), ("jobs", lambda f: f"{f.jobs:,}"),
    ("JCT mean", lambda f: seconds(f.jct_mean_s)), ("median", lambda f: seconds(f.jct_median_s)),
    ("p99", lambda f: seconds(f.jct_p99_s)), ("wait", lambda f: seconds(f.wait_mean_s)),
    ("makespan", lambda f: seconds(f.makespan_s)), ("used", lambda f: f"{f.utilisation:.0%}"),
    ("taken off", lambda f: f"{f.preemptions:,}"), ("moved", lambda f: f"{f.moves:,}"),
    ("worst ratio", lambda f: f"{f.ratio_worst:.2f}"),
    ("unfair", lambda f: f"{f.unfair_share:.1%}"),
)  # fmt: skip


# What one line of 80 columns takes; the policy is named on each part.
_TIMES = 7

LEGEND = (
    "JCT: from submit to end. used: of the devices' time. taken off: holds before",
    "the end. moved: out of memory. worst ratio, unfair (above 1): the time to the",
    "end over that with an equal share.",
)


def table(rows: Sequence[Figures]) -> list[str]:
    """Lines with aligned columns, in two parts of at most 80 columns."""
    return [*_part(rows, _COLUMNS[:_TIMES]), "", *_part(rows, (_COLUMNS[0], *_COLUMNS[_TIMES:]))]


def _part(rows: Sequence[Figures], columns: Sequence[tuple[str, Show]]) -> list[str]:
    cells = [[name for name, _ in columns], *([show(f) for _, show in columns] for f in rows)]
    widths = [max(len(line[k]) for line in cells) for k in range(len(columns))]
    return [
        "  ".join(
            c.ljust(w) if k == 0 else c.rjust(w)
            for k, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]


def seconds(value: float) -> str:
    """Four digits, with the largest unit that is below the value."""
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if value >= 2 * size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g} s"


def check_folder(path: str) -> None:
    """Before the work: is there a folder to write into? Raises BadInput."""
    folder = Path(path).resolve().parent
    if not folder.is_dir():
        raise BadInput(f"cannot write {path}: there is no folder {folder}")


def write_csv(path: str, rows: Iterable[Figures]) -> None:
    """One row a policy. Raises BadInput when the file cannot be written."""
    lines = [asdict(f) for f in rows]
    try:
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
    except OSError as exc:
        raise BadInput(f"cannot write {path}: {exc.strerror or exc}") from None
