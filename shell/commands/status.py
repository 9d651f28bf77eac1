"""`llmos status`: the kernel, its devices, and how many processes are in which state."""

from __future__ import annotations

from llmos.shell.client import Record
from llmos.shell.context import Context
from llmos.shell.options import JSON, Command, Values
from llmos.shell.render import Column, bar, duration, plural, size, table

_COLUMNS = (
    Column("DEVICE"), Column("KIND"), Column("LANES", right=True), Column("LOAD"),
    Column("RUNNING", right=True), Column("BUSY", right=True), Column("IDLE", right=True),
    Column("MEMORY", right=True),
)  # fmt: skip


def run(ctx: Context, values: Values) -> int:
    with ctx.client(auto_boot=False) as client:
        status = client.status()
    if values.get("json"):
        ctx.json(status)
        return 0
    kernel = status["kernel"]
    ctx.print(
        f"llmos {kernel['version']}, pid {kernel['os_pid']}, up {duration(kernel['uptime_s'])}, "
        f"policy {kernel.get('policy', '-')}"
    )
    ctx.print(f"home: {kernel.get('home', ctx.home.path)}")
    ctx.print(f"zygote: {(status.get('zygote') or {}).get('state', '-')}")
    ctx.lines(_disk(status))
    states = {s: n for s, n in (status.get("processes") or {}).items() if n}
    total = sum(states.values())
    split = ", ".join(f"{n} {state}" for state, n in states.items())
    ctx.print(f"{plural(total, 'process')}" + (f": {split}" if split else ""))
    ctx.print()
    ctx.lines(table(_COLUMNS, [_row(d) for d in status["devices"]], ctx.width))
    for device in status["devices"]:
        if device.get("found"):
            ctx.print(f"{device['device']} ({device['found']})")
    return 0


def _disk(status: Record) -> list[str]:
    """What is worth a line about the disk of the home: trouble, a network, rows set aside."""
    disk, journal = status.get("disk") or {}, status.get("journal") or {}
    lines = []
    if disk.get("trouble"):
        lines.append(f"trouble: {disk['trouble']}; no new work is taken, what runs goes on")
    if disk.get("network"):
        lines.append(f"disk: {disk['kind']}, of a network; journal: {journal['mode']}")
    if journal.get("set_aside"):
        pids = ", ".join(map(str, journal["set_aside"]))
        lines.append(f"set aside: the rows of {pids} are damaged; `llmos fsck` when it is down")
    return lines


def _row(d: Record) -> tuple[str, ...]:
    load = float(d.get("load") or 0.0)
    return (
        d["device"],
        d["kind"],
        str(d.get("lanes", "-")),
        f"{bar(load, 8)} {load:4.0%}",
        str(d.get("running_pid") or "-"),
        duration(d.get("busy_s")),
        duration(d.get("idle_s")),
        size(d.get("capacity_bytes")),
    )


COMMAND = Command(
    name="status",
    summary="The kernel, its devices and their load",
    run=run,
    options=(JSON,),
    examples=("llmos status", "llmos status --json"),
)
