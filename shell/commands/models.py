"""`llmos models`: the models of this home."""

from __future__ import annotations

import time

from llmos.shell.client import Record
from llmos.shell.context import Context
from llmos.shell.options import JSON, Command, Option, Usage, Values
from llmos.shell.render import Column, ago, count, size, table

_COLUMNS = (
    Column("NAME", shrink=8), Column("KIND"), Column("SIZE", right=True),
    Column("PARAMS", right=True), Column("FROM", shrink=8), Column("LICENSE", shrink=6),
    Column("WHEN", right=True),
)  # fmt: skip


def run(ctx: Context, values: Values) -> int:
    action, name = values.get("action", "ls"), values.get("name")
    if action != "ls" and not name:
        raise Usage(f"`llmos models {action}` needs the name of a model")
    if action == "ls":
        return _ls(ctx, bool(values.get("json")))
    with ctx.client() as client:
        if action in ("share", "unshare"):
            found = client.call("models.share", name=name, private=action == "unshare")
        else:
            found = client.call(f"models.{action}", name=name)
    if values.get("json"):
        ctx.json(found)
    elif action in ("share", "unshare"):
        who = "every member of the group" if found["shared"] else "its user alone"
        ctx.say(f"{name} can be read by {who}")
    elif action == "rm":
        ctx.say(f"{name} is deleted: {size(found['freed_bytes'])} freed")
    else:
        ctx.lines(_details(found))
    return 0


def _ls(ctx: Context, as_json: bool) -> int:
    with ctx.client() as client:
        models = client.call("models.ls")
    if as_json:
        ctx.json(models)
        return 0
    now = time.time()
    ctx.lines(table(_COLUMNS, [_row(m, now) for m in models], ctx.width))
    if not models:
        ctx.say("no models yet: `llmos pull smollm2` brings one, `llmos pretrain --help` shows how "
                "to make one; `run` and `chat` also take a folder")  # fmt: skip
    return 0


def _row(m: Record, now: float) -> tuple[str, ...]:
    parameters = m.get("parameters")
    return (
        m["name"],
        m["kind"],
        size(m["bytes"]),
        count(parameters) if parameters else "-",
        m["source"] or "-",
        m.get("license") or "-",
        ago(m["created_at"], now),
    )


def _details(m: Record) -> list[str]:
    plain = {k: v for k, v in m.items() if k not in ("files", "config", "made_by")}
    at = time.strftime("%Y-%m-%d %H:%M", time.localtime(plain["created_at"]))
    plain |= {"bytes": f"{plain['bytes']:,}", "created_at": at}
    lines = [f"{key:<14} {'-' if value in ('', None) else value}" for key, value in plain.items()]
    made_by = {f"made_by.{key}": value for key, value in (m.get("made_by") or {}).items()}
    lines += [f"{key:<20} {value}" for key, value in made_by.items()]
    return lines + [f"  {size(f['bytes']):>6}  {f['name']}" for f in m.get("files", [])]


COMMAND = Command(
    name="models",
    summary="The models of this home: ls, show, rm, share, unshare",
    run=run,
    options=(
        Option("action", "what to do; default: ls", positional=True, metavar="ACTION",
               choices=("ls", "show", "rm", "share", "unshare")),
        Option("name", "a model", positional=True, metavar="NAME", complete="model"),
        JSON,
    ),
    details="A model is a folder in the home's models/; a folder copied there is one too. Where "
    "a kernel serves a group a new model is its maker's alone until it is shared.",
    examples=("llmos models", "llmos models show shakespeare", "llmos models rm old",
              "llmos models share shakespeare"),
)  # fmt: skip
