"""`llmos service`: the supervised services."""

from __future__ import annotations

import time

from llmos.kernel.errors import NoSuchThing
from llmos.shell.client import Client, Record
from llmos.shell.commands.logs import show
from llmos.shell.context import Context
from llmos.shell.options import JSON, Command, Option, Usage, Values
from llmos.shell.render import Column, duration, table
from llmos.shell.resolve import nearest_hint

_COLUMNS = (
    Column("NAME"), Column("STATE"), Column("PID", right=True), Column("OSPID", right=True),
    Column("RESTARTS", right=True), Column("UP", right=True), Column("SUMMARY", shrink=10),
)  # fmt: skip


def run(ctx: Context, values: Values) -> int:
    action, name = values.get("action", "ls"), values.get("name")
    if action != "ls" and not name:
        raise Usage(f"`llmos service {action}` needs the name of a service")
    with ctx.client() as client:
        if action == "ls":
            return _ls(ctx, client.services(), bool(values.get("json")))
        if action == "restart":
            done = client.restart_service(str(name))
            ctx.say(f"{done['name']} runs again (process {done['pid']})")
            return 0
        pid = _pid_of(client, str(name))
        show(ctx, client.logs(pid, tail=values.get("lines", -1), follow=bool(values.get("follow"))))
    return 0


def _ls(ctx: Context, services: list[Record], as_json: bool) -> int:
    if as_json:
        ctx.json(services)
        return 0
    now = time.time()
    rows = [
        (
            s["name"],
            s["state"],
            str(s["pid"]),
            str(s.get("os_pid") or "-"),
            str(s["restarts"]),
            duration(now - s["since"]) if s.get("since") else "-",
            s.get("summary") or "",
        )
        for s in services
    ]
    ctx.lines(table(_COLUMNS, rows, ctx.width))
    return 0


def _pid_of(client: Client, name: str) -> int:
    services = {s["name"]: int(s["pid"]) for s in client.services()}
    if name not in services:
        raise NoSuchThing(f"there is no service {name!r}", nearest_hint(name, services))
    return services[name]


COMMAND = Command(
    name="service",
    summary="The supervised services: list, restart, read their logs",
    run=run,
    options=(
        Option("action", "what to do; default: ls", positional=True,
               metavar="ls|restart|logs", choices=("ls", "restart", "logs")),
        Option("name", "a service", positional=True, metavar="NAME", complete="service"),
        Option("follow", "logs: go on as they grow", type="bool", short="-f"),
        Option("lines", "logs: only the last N lines", type="int", short="-n", minimum=0),
        JSON,
    ),
    examples=("llmos service", "llmos service restart models", "llmos service logs -f models"),
)  # fmt: skip
