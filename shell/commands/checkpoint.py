"""`llmos checkpoint`: have trainings write a checkpoint now."""

from __future__ import annotations

from llmos.shell.context import Context
from llmos.shell.options import JSON, PIDS, Command, Values
from llmos.shell.processes import find_pid


def run(ctx: Context, values: Values) -> int:
    with ctx.client() as client:
        made = [client.checkpoint(find_pid(client, word)) for word in values["pids"]]
    if values.get("json"):
        ctx.json(made)
    else:
        ctx.lines(f"{c['pid']}: step {c['step']} in {c['folder']}" for c in made)
    return 0


COMMAND = Command(
    name="checkpoint",
    summary="Write a checkpoint of trainings now",
    run=run,
    options=(PIDS, JSON),
    details="Returns when it is on disk.",
    examples=("llmos checkpoint 3",),
)
