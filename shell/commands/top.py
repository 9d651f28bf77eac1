"""`llmos top`: the live view."""

from __future__ import annotations

import asyncio
import sys

from llmos.shell.context import Context
from llmos.shell.options import Command, Option, Values


def run(ctx: Context, values: Values) -> int:
    from llmos.shell.top import Top, is_dumb, once

    no_screen = not (sys.stdin.isatty() and sys.stdout.isatty()) or is_dumb()
    if values.get("once") or no_screen:
        ctx.lines(asyncio.run(once(ctx.home, ctx.width)))
        return 0
    with ctx.client() as client:
        client.ping()  # no kernel: say so before the screen is cleared

    async def show() -> None:
        await Top(ctx.home, values.get("delay", 1.0), bool(values.get("readonly"))).run()

    asyncio.run(show())
    return 0


COMMAND = Command(
    name="top",
    summary="Live view of devices, processes and the last decisions",
    run=run,
    options=(
        Option("once", "print one frame and leave", type="bool", short="-1"),
        Option("delay", "time between two looks; default: 1s", type="duration", metavar="TIME",
               minimum=0.1),
        Option("readonly", "keys cannot change anything", type="bool"),
    ),
    details="h shows the keys.",
    examples=("llmos top", "llmos top -1"),
)  # fmt: skip
