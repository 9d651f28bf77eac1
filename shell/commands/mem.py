"""`llmos mem`: the books of device memory."""

from __future__ import annotations

from llmos.shell.client import Record
from llmos.shell.context import Context
from llmos.shell.options import JSON, Command, Values
from llmos.shell.render import Column, bar, size, table

_COLUMNS = (
    Column("KIND"), Column("BYTES", right=True), Column("WHERE"), Column("SHARED"),
    Column("PROCESSES", shrink=9),
)  # fmt: skip


def run(ctx: Context, values: Values) -> int:
    with ctx.client() as client:
        devices = client.mem()
    if values.get("json"):
        ctx.json(devices)
        return 0
    for i, device in enumerate(devices):
        if i:
            ctx.print()
        ctx.lines(device_lines(device, ctx.width))
    return 0


def device_lines(d: Record, width: int) -> list[str]:
    """One device: what adds up to its capacity, and the segments."""
    capacity = d["capacity_bytes"]
    used = (capacity - d["free_bytes"]) / capacity if capacity else 0.0
    lines = [
        f"{d['device']} ({d['kind']}): {size(capacity)} = {size(d['foreign_bytes'])} others + "
        f"{size(d['promised_bytes'])} promised + {size(d['free_bytes'])} free",
        f"{bar(used, 30)} {used:.0%}   measured {size(d['measured_bytes'])}, "
        f"the system has {size(d.get('available_bytes'))} available",
    ]
    segments = sorted(d["segments"], key=lambda s: -s["bytes"])
    rows = [
        (
            s["kind"],
            size(s["bytes"]),
            s.get("residency") or "-",
            "yes" if s.get("shared") else "",
            " ".join(str(p) for p in s["pids"] if p) or "the system",
        )
        for s in segments
    ]
    if rows:
        lines += ["  " + line for line in table(_COLUMNS, rows, width - 2)]
    return lines


COMMAND = Command(
    name="mem",
    summary="The books of device memory: who holds what, and what is free",
    run=run,
    options=(JSON,),
    details="others + promised + free = the capacity. Others are processes outside llmos; "
    "promised is what admitted processes may take at their peak.",
    examples=("llmos mem", "llmos mem --json"),
)
