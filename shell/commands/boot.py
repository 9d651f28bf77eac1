"""`llmos boot`: start the kernel of this home."""

from __future__ import annotations

import os

from llmos.shell import autoboot
from llmos.shell.context import Context
from llmos.shell.home import prepare
from llmos.shell.launch import Launch, already_running, kernel_command, running
from llmos.shell.options import Command, Option, Values
from llmos.shell.unit import instructions, unit


def run(ctx: Context, values: Values) -> int:
    group = values.get("group", "")
    flags = (values.get("device", []), values.get("policy", ""), values.get("batch_share"), group)
    if values.get("print_unit"):
        return _print_unit(ctx, kernel_command(ctx.home, *flags), bool(group))
    found = running(ctx.home)
    if found is not None:
        raise already_running(ctx.home, found)
    if values.get("foreground"):
        for line in prepare(ctx.home, group):
            ctx.say(line)
        _set_auto_boot(ctx, values)
        command = kernel_command(ctx.home, *flags)
        os.execv(command[0], command)
    launch = Launch(ctx.home, *flags)
    _set_auto_boot(ctx, values)
    for line in launch.changed:
        ctx.say(line)
    status = launch.wait()
    names = ", ".join(d["device"] for d in status["devices"])
    ctx.print(
        f"llmos runs: pid {status['kernel']['os_pid']}, home {ctx.home.path}, devices {names}"
    )
    ctx.say("  `llmos` opens the shell, `llmos help` lists commands, `llmos shutdown` ends it")
    return 0


def _print_unit(ctx: Context, command: list[str], system: bool) -> int:
    kept = {k: os.environ[k] for k in _KEPT if k in os.environ}
    ctx.print(unit(ctx.home, command, system, kept).rstrip())
    for line in instructions(system):
        ctx.say(line)
    return 0


def _set_auto_boot(ctx: Context, values: Values) -> None:
    """What the last boot said counts."""
    if values.get("auto_boot"):
        names = ("devices", "policy", "batch_share", "group")
        given = {**values, "devices": values.get("device", [])}
        autoboot.remember(ctx.home, {n: given[n] for n in names if given.get(n)})
    else:
        autoboot.forget(ctx.home)


# Of the environment of who prints it a unit keeps what decides where models and caches lie.
_KEPT = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "LLMOS_DEVICE", "CUDA_VISIBLE_DEVICES")

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
        Option(
            "batch_share",
            "part of a device's time that batch gets beside interactive processes (default 0.05)",
            type="float",
            minimum=0,
            maximum=0.5,
        ),
        Option(
            "group",
            "serve the members of a group, each as himself; needs root",
            metavar="NAME",
        ),
        Option("auto_boot", "any client starts it again when it has died", type="bool"),
        Option(
            "print_unit", "only print a systemd unit that starts it with the machine", type="bool"
        ),
        Option("foreground", "stay in the terminal; Ctrl-C shuts down", type="bool"),
    ),
    details="The home is $LLMOS_HOME, or ~/.llmos: socket, log, models and processes lie in it. "
    "What ran when the last kernel was shut down goes on. config.toml in the home says the same as "
    "these flags for every boot; a flag wins.",
    examples=(
        "llmos boot",
        "LLMOS_HOME=/data/llmos llmos boot",
        "llmos boot --device cpu0:cores=0,memory=8GiB --device cpu1:cores=1",
        "llmos boot --print-unit > ~/.config/systemd/user/llmos.service",
        "LLMOS_HOME=/var/lib/llmos llmos boot --group ml",
    ),
)
