"""`llmos wait`: until processes have ended."""

from __future__ import annotations

from llmos.kernel.errors import LlmosError, NoSuchProcess
from llmos.shell.context import Context
from llmos.shell.options import JSON, PIDS, Command, Option, Values
from llmos.shell.processes import look_up_pid

WAITING_FAILED = 125
UNKNOWN_PID = 127


def run(ctx: Context, values: Values) -> int:
    status, ended = 0, []
    try:
        with ctx.client() as client:
            for word in values["pids"]:
                done = client.wait(look_up_pid(client, word), values.get("timeout"))
                status = int(done["exit_status"])
                ended.append(done)
    except LlmosError as exc:
        ctx.say(f"llmos: {exc.message}" + (f"\n  {exc.hint}" if exc.hint else ""))
        status = UNKNOWN_PID if isinstance(exc, NoSuchProcess) else WAITING_FAILED
    if values.get("json"):
        ctx.json(ended)
    return status


COMMAND = Command(
    name="wait",
    summary="Wait until processes have ended, and exit as the last of them",
    run=run,
    options=(
        PIDS,
        Option("timeout", "give up after this time, with status 125", type="duration",
               metavar="TIME"),
        JSON,
    ),
    details="Exit status: the process's own; 125 when waiting itself failed, 127 for a pid "
    "that is not known; 128+n for a process that signal n ended.",
    examples=("llmos wait 3", "llmos wait --timeout 5m 3 4", "llmos wait --json 3"),
)  # fmt: skip
