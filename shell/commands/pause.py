"""`llmos pause`: take the device from processes until `resume`."""

from __future__ import annotations

from llmos.shell.context import Context
from llmos.shell.options import PIDS, Command, Values
from llmos.shell.processes import find_pid


def run(ctx: Context, values: Values) -> int:
    with ctx.client() as client:
        for word in values["pids"]:
            pid = find_pid(client, word)
            state = client.pause(pid)["state"]
            ctx.say(f"{pid} is {state}; `llmos resume {pid}` lets it go on")
    return 0


COMMAND = Command(
    name="pause",
    summary="Take the device from processes until `resume`",
    run=run,
    options=(PIDS,),
    details="Their memory stays. Returns when they are off the device.",
    examples=("llmos pause 3", "llmos pause my-run other-run"),
)
