"""`llmos nice`: run a program with another nice value."""

from __future__ import annotations

from llmos.shell.context import Context
from llmos.shell.options import Command, Option, Usage, Values

# nice(1) adds 10 when nothing is said.
DEFAULT = 10


def run(ctx: Context, values: Values) -> int:
    from llmos.shell.main import dispatch, find

    name, *rest = values["command"]
    command = find(ctx, name)
    if "nice" not in {o.name for o in command.options}:
        raise Usage(f"`{name}` runs no program: there is nothing to be nice",
                    "programs are run, chat, pretrain, finetune, gan")  # fmt: skip
    return dispatch([name, "--nice", str(values.get("adjustment", DEFAULT)), *rest], ctx)


COMMAND = Command(
    name="nice",
    summary="Run a program with another nice value (lower: more important)",
    run=run,
    options=(
        Option("command", "the command and its arguments", positional=True, required=True,
               rest=True, metavar="COMMAND", complete="command"),
        Option("adjustment", "the nice value", type="int", short="-n", default=DEFAULT,
               metavar="N", minimum=-20, maximum=19),
    ),
    examples=("llmos nice -n 10 pretrain --data book.txt --out book",),
)  # fmt: skip
