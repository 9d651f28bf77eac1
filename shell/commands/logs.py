"""`llmos logs`: what processes printed."""

from __future__ import annotations

import sys

from llmos.shell.context import Context
from llmos.shell.options import PID, Command, Option, Values
from llmos.shell.processes import look_up_pid
from llmos.shell.render import clean_text


def run(ctx: Context, values: Values) -> int:
    with ctx.client() as client:
        pid = look_up_pid(client, values["pid"])
        show(ctx, client.logs(pid, tail=values.get("lines", -1), follow=bool(values.get("follow"))))
    return 0


def show(ctx: Context, pieces: object) -> None:
    """Bytes as they are into a pipe; without control characters on a terminal."""
    for data in pieces:  # type: ignore[attr-defined]
        if ctx.stdout_is_terminal:
            sys.stdout.write(clean_text(data.decode(errors="replace")))
        else:
            sys.stdout.buffer.write(data)
        sys.stdout.flush()


COMMAND = Command(
    name="logs",
    summary="What a process printed",
    run=run,
    options=(
        PID,
        Option("follow", "go on as it grows, until the process ends", type="bool", short="-f"),
        Option("lines", "only the last N lines", type="int", short="-n", minimum=0),
    ),
    examples=("llmos logs 3", "llmos logs -f -n 20 my-run"),
)
