"""`llmos key`: the API keys of the gateway."""

from __future__ import annotations

import time

from llmos.shell import keys
from llmos.shell.context import Context
from llmos.shell.options import JSON, Command, Option, Usage, Values
from llmos.shell.render import Column, ago, table

_COLUMNS = (Column("NAME", shrink=8), Column("USER"), Column("ID"), Column("WHEN", right=True))


def run(ctx: Context, values: Values) -> int:
    action, name = values.get("action", "ls"), values.get("name")
    if action == "ls":
        return _ls(ctx, bool(values.get("json")))
    if not name:
        raise Usage(f"`llmos key {action}` needs the name of a key")
    if action == "rm":
        keys.remove(ctx.home, name)
        ctx.say(f"{name} is deleted: it opens nothing any more")
        return 0
    made, key = keys.new(ctx.home, name, values.get("user", ""))
    if values.get("json"):
        ctx.json({"id": made["id"], "name": name, "user": made["user"], "key": key})
        return 0
    ctx.print(key)
    ctx.say("  this is the only time it is shown; `export OPENAI_API_KEY=...` gives it to clients")
    return 0


def _ls(ctx: Context, as_json: bool) -> int:
    found = [{n: v for n, v in key.items() if n != "sha256"} for key in keys.listed(ctx.home)]
    if as_json:
        ctx.json(found)
        return 0
    now = time.time()
    rows = [(k["name"], k["user"], k["id"], ago(k["created_at"], now)) for k in found]
    ctx.lines(table(_COLUMNS, rows, ctx.width))
    if not found:
        ctx.say("no keys: whoever can connect to the gateway may ask (`llmos key new NAME`)")
    return 0


COMMAND = Command(
    name="key",
    summary="API keys of the gateway: new, ls, rm",
    run=run,
    options=(
        Option(
            "action",
            "what to do; default: ls",
            positional=True,
            metavar="ACTION",
            choices=("ls", "new", "rm"),
        ),
        Option("name", "what the key is called", positional=True, metavar="NAME"),
        Option("user", "new: whose processes its requests are (root only)", metavar="NAME"),
        JSON,
    ),
    details="As soon as there is a key the gateway takes no request without one. Only hashes are "
    "kept, in gateway/keys.json of the home. A running gateway notices at once.",
    examples=("llmos key new laptop", "llmos key", "llmos key rm laptop"),
)
