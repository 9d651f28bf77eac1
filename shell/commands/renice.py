"""`llmos renice`: change how important processes are."""

from __future__ import annotations

from llmos.shell.context import Context
from llmos.shell.options import PIDS, Command, Option, Values
from llmos.shell.processes import find_pid


def prepare(argv: list[str]) -> list[str]:
    """`renice -n 5 PID`, as renice(1) takes it too."""
    return [word for word in argv if word not in ("-n", "--priority")]


def run(ctx: Context, values: Values) -> int:
    with ctx.client() as client:
        for word in values["pids"]:
            done = client.renice(find_pid(client, word), values["nice"])
            ctx.say(f"{done['pid']} has nice {done['nice']}")
    return 0


COMMAND = Command(
    name="renice",
    summary="Change the nice value of processes (lower: more important)",
    run=run,
    prepare=prepare,
    options=(
        Option("nice", "-20 (most important) ... 19 (least)", type="int", positional=True,
               required=True, metavar="NICE", minimum=-20, maximum=19),
        PIDS,
    ),
    details="Each step of nice is about 1.25 times the device time against others of the class.",
    examples=("llmos renice 10 3", "llmos renice -n -5 my-run"),
)  # fmt: skip
