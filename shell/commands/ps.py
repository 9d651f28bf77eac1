"""`llmos ps`: the processes."""

from __future__ import annotations

from llmos.shell.context import Context
from llmos.shell.options import JSON, Command, Option, Values
from llmos.shell.processes import process_table


def run(ctx: Context, values: Values) -> int:
    with ctx.client() as client:
        processes = client.ps(all=bool(values.get("all")))
    if values.get("json"):
        ctx.json(processes)
        return 0
    ctx.lines(process_table(processes, 0 if values.get("wide") else ctx.width))
    return 0


COMMAND = Command(
    name="ps",
    summary="List the processes",
    run=run,
    options=(
        Option("all", "also those that have ended", type="bool", short="-a"),
        Option("wide", "do not shorten anything", type="bool", short="-w"),
        JSON,
    ),
    details="MEM is measured; ~ before it: promised, not yet measured. TIME is time on the "
    "device. `llmos explain PID` tells why a process is where it is.",
    examples=("llmos ps", "llmos ps -a", "llmos ps --json"),
)
