"""`llmos boot`: start the kernel of this home."""

from __future__ import annotations

import os

from llmos.shell.context import Context
from llmos.shell.home import prepare
from llmos.shell.launch import Launch, already_running, kernel_command, running
from llmos.shell.options import Command, Option, Values


def run(ctx: Context, values: Values) -> int:
    devices, policy = values.get("device", []), values.get("policy", "")
    found = running(ctx.home)
    if found is not None:
        raise already_running(ctx.home, found)
    if values.get("foreground"):
        for line in prepare(ctx.home):
            ctx.say(line)
        command = kernel_command(ctx.home, devices, policy)
        os.execv(command[0], command)
    launch = Launch(ctx.home, devices, policy)
    for line in launch.changed:
        ctx.say(line)
    status = launch.wait()
    names = ", ".join(d["device"] for d in status["devices"])
    ctx.print(
        f"llmos runs: pid {status['kernel']['os_pid']}, home {ctx.home.path}, devices {names}"
    )
    ctx.say("  `llmos` opens the shell, `llmos help` lists commands, `llmos shutdown` ends it")
    return 0


COMMAND = Command(
    name="boot",
    summary="Start the kernel of this home, in the background",
    run=run,
    options=(
        Option(
            "device",
            "a device and its limits (repeatable); default: what the machine has",
            type="list",
            metavar="SPEC",
        ),
        Option("policy", "the scheduling policy", metavar="NAME"),
        Option("foreground", "stay in the terminal; Ctrl-C shuts down", type="bool"),
    ),
    details="The home is $LLMOS_HOME, or ~/.llmos: socket, log, models and processes lie in it. "
    "What ran when the last kernel was shut down goes on.",
    examples=(
        "llmos boot",
        "LLMOS_HOME=/data/llmos llmos boot",
        "llmos boot --device cpu0:cores=0,memory=8GiB --device cpu1:cores=1",
    ),
)
