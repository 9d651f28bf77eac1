"""`llmos shutdown`: checkpoint everything, stop it, end the kernel."""

from __future__ import annotations

from llmos.shell.context import Context
from llmos.shell.launch import wait_gone
from llmos.shell.options import Command, Values
from llmos.shell.render import plural

# The workers have ended when the kernel answers; what is left is closing files.
GONE_S = 60.0


def run(ctx: Context, values: Values) -> int:
    with ctx.client(auto_boot=False) as client:
        os_pid = client.status()["kernel"]["os_pid"]
        done = client.shutdown()
    wait_gone(os_pid, GONE_S)
    stopped, saved = int(done.get("stopped", 0)), int(done.get("checkpoints", 0))
    ctx.print(
        f"llmos has ended: {plural(stopped, 'worker')} stopped, {plural(saved, 'checkpoint')}"
    )
    if saved:
        ctx.say("  `llmos boot` lets them go on where they were")
    return 0


COMMAND = Command(
    name="shutdown",
    summary="Checkpoint and stop every worker, and end the kernel",
    run=run,
    details="Returns when the kernel is gone. After the next `llmos boot` everything goes on "
    "that a person had not paused.",
    examples=("llmos shutdown",),
)
