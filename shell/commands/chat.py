"""`llmos chat`: talk with a model: program `chat`, turn by turn."""

from __future__ import annotations

import sys

from llmos.shell.chat import Conversation, reader, talk
from llmos.shell.commands.program import COMMON, launch
from llmos.shell.context import Context
from llmos.shell.options import Command, Option, Values
from llmos.shell.resolve import schema_of


def run(ctx: Context, values: Values) -> int:
    if values.get("dry_run") or values.get("detach"):
        return launch(ctx, COMMAND.program, values)
    schema = schema_of(ctx.manifest() or {"programs": {}}, COMMAND.program)
    args = {f["name"]: values[f["name"]] for f in schema["args"] if f["name"] in values}
    common = {o.name for o in COMMON} - {"detach", "dry_run"} - set(args)
    options = {name: values[name] for name in common if name in values}
    options["cls"] = options.pop("class", "")
    with ctx.client() as client:
        conversation = Conversation(ctx, client, schema, args, options)
        if sys.stdin.isatty():
            ctx.say("/? lists commands; Ctrl-C stops an answer, Ctrl-D leaves")
        talk(ctx, conversation, reader(ctx), bool(values.get("stats")))
        conversation.end()
    return 0


COMMAND = Command(
    name="chat",
    summary="Talk with a model; Ctrl-C stops an answer, Ctrl-D leaves",
    run=run,
    program="chat",
    options=(Option("stats", "print tokens and speed after each answer", type="bool",
                    short="-v"),),
    details="Lines that begin with / are commands: /? lists them. On a pipe each line is a turn.",
)  # fmt: skip
