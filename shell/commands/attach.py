"""`llmos attach`: show a running process as if it had been started here."""

from __future__ import annotations

from llmos.shell.context import Context
from llmos.shell.follow import follow
from llmos.shell.options import PID, Command, Option, Values
from llmos.shell.processes import look_up_pid


def run(ctx: Context, values: Values) -> int:
    with ctx.client() as client:
        process = client.process(look_up_pid(client, values["pid"]))
        programs = client.programs()["programs"]
        # An engine and a service have streams too, but are nobody's program to run.
        schema = programs.get(process["program"]) or {"name": process["program"]}
        # Whoever attaches looks on: leaving must not end what others started.
        looking = {**schema, "on_interrupt": "detach"}
        skip_old = not values.get("from_start")
        return follow(ctx, client, process["pid"], looking, skip_old=skip_old)


COMMAND = Command(
    name="attach",
    summary="Show a process while it runs; Ctrl-C leaves it running",
    run=run,
    options=(
        PID,
        Option("from_start", "show all that it has told since it began", type="bool"),
    ),
    details="The exit status is the process's.",
    examples=("llmos attach 3", "llmos attach --from-start my-run"),
)
