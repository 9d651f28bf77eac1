"""The line at the bottom of the interactive shell: devices' load and memory, processes by state."""

from __future__ import annotations

from llmos.shell.client import Record
from llmos.shell.poller import Known, Poller
from llmos.shell.render import bar, fit, size

# The states worth a place in one line, in this order.
_STATES = ("running", "preempted", "ready", "starting", "waiting", "paused", "backoff")


def toolbar(poller: Poller, width: int, trouble: str = "") -> str:
    """One line, exactly `width` columns."""
    if trouble:
        return fit(f" {trouble}", width)
    if poller.hangs:
        return fit(" the kernel does not answer", width)
    return fit(" " + describe(poller.known, width), width)


def describe(known: Known, width: int) -> str:
    """The devices, then the processes, as far as there is room."""
    if known.status is None:
        hint = "`boot` starts one" if known.trouble == "no kernel" else ""
        return f"{known.trouble}  {hint}".rstrip()
    disk = (known.status.get("disk") or {}).get("trouble")
    if disk:
        return f"{disk}  {_counts(known.processes)}"
    books = {d["device"]: d for d in known.mem}
    parts = [_device(d, books.get(d["device"])) for d in known.status["devices"]]
    counts = _counts(known.processes)
    # The processes are worth more than a third device.
    while len(parts) > 1 and len("   ".join([*parts, counts])) > width - 2:
        parts.pop()
    return "   ".join([*parts, counts])


def _device(d: Record, books: Record | None) -> str:
    load = float(d.get("load") or 0.0)
    text = f"{d['device']} {bar(load, 6)} {load:.0%}"
    if books is not None:
        used = books["capacity_bytes"] - books["free_bytes"]
        text += f" mem {size(used)}/{size(books['capacity_bytes'])}"
    return text


def _counts(processes: list[Record]) -> str:
    own = [p["state"] for p in processes if p.get("role") != "service"]
    counts = [f"{own.count(state)} {state}" for state in _STATES if state in own]
    return ", ".join(counts) or "nothing runs"
