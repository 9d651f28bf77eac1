"""`llmos renice`: change how important processes are."""

from __future__ import annotations

import time

from llmos.shell.client import Record
from llmos.shell.context import Context
from llmos.shell.options import PIDS, Command, Option, Usage, Values
from llmos.shell.processes import find_pid

_FLAGS = ("-n", "--priority")


def prepare(argv: list[str]) -> list[str]:
    """`renice 5 PID` and `renice --priority 5 PID`, as renice(1) takes them, are `-n 5`."""
    words = ["-n" if word == "--priority" else word for word in argv]
    first = words[0] if words else ""
    if first.lstrip("+-").isdigit() and len(words) > 1:
        return ["-n", first, *words[1:]]
    return words


def run(ctx: Context, values: Values) -> int:
    changes = {name: values[name] for name in ("nice", "class", "deadline") if name in values}
    if not changes:
        raise Usage("nothing to change", "give a nice value, --class or --deadline")
    with ctx.client() as client:
        for word in values["pids"]:
            done = client.renice(
                find_pid(client, word),
                values.get("nice"),
                cls=values.get("class"),
                deadline_s=values.get("deadline"),
            )
            ctx.say(f"{done['pid']} has {_now(done)}")
    return 0


def _now(done: Record) -> str:
    text = f"nice {done['nice']}, class {done['class']}"
    if done["deadline_at"]:
        text += f", and is to be done in {max(0.0, done['deadline_at'] - time.time()):.0f} s"
    return text


COMMAND = Command(
    name="renice",
    summary="Change nice value, class or deadline of processes, at once",
    run=run,
    prepare=prepare,
    options=(
        Option("nice", "-20 (most important) ... 19 (least)", type="int", short="-n",
               metavar="NICE", minimum=-20, maximum=19),
        Option("class", "which processes it goes before",
               choices=("interactive", "batch", "idle")),
        Option("deadline", "be done in so long from now (0: whenever)", type="duration",
               minimum=0, metavar="TIME"),
        PIDS,
    ),
    details="Each step of nice is about 1.25 times the device time against others of the class. "
    "A deadline changes nothing while there is time; then the process goes before the others of "
    "its class and user.",
    examples=("llmos renice 10 3", "llmos renice -n -5 my-run", "llmos renice --class idle 3",
              "llmos renice --deadline 2h my-run"),
)  # fmt: skip
