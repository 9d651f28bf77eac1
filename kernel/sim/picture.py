"""The picture of a simulation: how many jobs are done in what time, and what waits when."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from llmos.kernel.errors import BadInput, NoSuchThing
from llmos.kernel.sim.report import check_folder, jct
from llmos.kernel.sim.world import Outcome


def check(path: str) -> None:
    """Before the work: what `draw` would raise after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise NoSuchThing(
            "a picture needs matplotlib, which is not installed", "pip install 'llmos[sim]'"
        )
    check_folder(path)


def draw(path: str, outcomes: Mapping[str, Outcome], title: str) -> None:
    """Write a PNG. Raises BadInput when it cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, outcome in outcomes.items():
        times = sorted(jct(r) for r in outcome.runs if r.ended_at is not None)
        left.plot(times, [(k + 1) / len(times) for k in range(len(times))], label=name)
        right.step(*_alive(outcome), where="post", label=name)
    left.set(
        xscale="log", xlabel="job completion time (s)", ylabel="share of the jobs", ylim=(0, 1)
    )
    left.xaxis.set_minor_formatter(NullFormatter())  # they would lie over each other
    right.set(xlabel="time (s)", ylabel="jobs that are not done", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as exc:
        why = getattr(exc, "strerror", None) or exc
        raise BadInput(f"cannot write {path}: {why}") from None


def _alive(outcome: Outcome) -> tuple[list[float], list[int]]:
    """When the number of jobs that have come and are not done changes, and to what."""
    changes: list[tuple[float, int]] = []
    for run in outcome.runs:
        if run.ended_at is not None:
            changes += [(run.job.submit_s, 1), (run.ended_at, -1)]
    changes.sort()
    times, counts, now = [0.0], [0], 0
    for at, change in changes:
        now += change
        times.append(at)
        counts.append(now)
    return times, counts
