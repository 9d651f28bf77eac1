"""`llmos resume`: let paused processes go on."""

from __future__ import annotations

from llmos.shell.context import Context
from llmos.shell.options import PIDS, Command, Values
from llmos.shell.processes import find_pid


def run(ctx: Context, values: Values) -> int:
    with ctx.client() as client:
        for word in values["pids"]:
            pid = find_pid(client, word)
            ctx.say(f"{pid} is {client.resume(pid)['state']}")
    return 0


COMMAND = Command(
    name="resume",
    summary="Let paused processes go on",
    run=run,
    options=(PIDS,),
    details="The result is the same as if they had never been paused.",
    examples=("llmos resume 3",),
)
