"""`llmos pause`: take the device from processes until `resume`."""

from __future__ import annotations

from llmos.shell.context import Context
from llmos.shell.options import PIDS, Command, Option, Values
from llmos.shell.processes import find_pid
from llmos.shell.render import size


def run(ctx: Context, values: Values) -> int:
    release = bool(values.get("release"))
    with ctx.client() as client:
        for word in values["pids"]:
            pid = find_pid(client, word)
            answer = client.pause(pid, release=release)
            freed = ""
            if release:
                freed = f"; {size(answer['freed_bytes'])} came free in {answer['seconds']:.1f} s"
            if answer["state"] == "exited":
                ctx.say(f"{pid} has ended{freed}; the next request loads its model again")
            else:
                ctx.say(f"{pid} is {answer['state']}{freed}; `llmos resume {pid}` lets it go on")
    return 0


COMMAND = Command(
    name="pause",
    summary="Take the device from processes until `resume`",
    run=run,
    options=(
        PIDS,
        Option("release", "give their memory back, too", type="bool"),
    ),
    details="Their memory stays unless --release gives it back: they are checkpointed, or moved to "
    "the host, and go on from there. Returns when they are off the device, and with --release "
    "when the device reports the memory free. An engine that nobody uses is ended by --release.",
    examples=("llmos pause 3", "llmos pause --release my-run"),
)
