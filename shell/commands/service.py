"""`llmos service`: the supervised services, and a new one to begin with."""

from __future__ import annotations

import time
from pathlib import Path

from llmos.kernel.errors import NoSuchThing
from llmos.shell.client import Client, Record
from llmos.shell.commands.call import check_broken, find_broken
from llmos.shell.commands.logs import show
from llmos.shell.context import Context
from llmos.shell.options import JSON, Command, Option, Usage, Values
from llmos.shell.render import Column, duration, size, table
from llmos.shell.resolve import nearest_hint

_COLUMNS = (
    Column("NAME"), Column("STATE"), Column("PID", right=True), Column("OSPID", right=True),
    Column("RESTARTS", right=True), Column("UP", right=True), Column("MEM", right=True),
    Column("SUMMARY", shrink=10),
)  # fmt: skip

ACTIONS = ("ls", "start", "stop", "restart", "logs", "enable", "disable", "reload", "new")
_SAID = {
    "start": "{name} runs (process {pid})",
    "stop": "{name} is stopped until it is started, or until the next boot",
    "restart": "{name} runs again (process {pid})",
    "enable": "{name} runs (process {pid}), and is started at each boot",
    "disable": "{name} is stopped, and not started at boot any more",
}


def run(ctx: Context, values: Values) -> int:
    action, name = values.get("action", "ls"), values.get("name")
    if action not in ("ls", "reload") and not name:
        raise Usage(f"`llmos service {action}` needs the name of a service")
    if action == "new":
        return _new(ctx, str(name), values.get("path"))
    with ctx.client() as client:
        match action:
            case "ls":
                return _ls(ctx, client.services(), bool(values.get("json")))
            case "reload":
                return _reload(ctx, client.reload_services(), bool(values.get("json")))
            case "logs":
                _logs(ctx, client, str(name), values)
            case _:
                done = getattr(client, f"{action}_service")(str(name))
                ctx.say(_SAID[action].format(**done))
    return 0


def _logs(ctx: Context, client: Client, name: str, values: Values) -> None:
    """Of one that could not be imported: what it printed then, and why."""
    services = {s["name"]: s for s in client.services()}
    if name not in services:  # it may have been installed since the last boot
        client.programs(checked=True)
        services = {s["name"]: s for s in client.services()}
    if name not in services:
        raise NoSuchThing(f"there is no service {name!r}", nearest_hint(name, services))
    lines = values.get("lines", -1)
    if services[name]["state"] == "broken":
        manifest = client.programs(checked=True)
        broken = find_broken(name, manifest) or {}
        printed = str(broken.get("printed", "")).splitlines(keepends=True)
        show(ctx, [line.encode() for line in printed[-lines if lines >= 0 else 0 :]])
        check_broken(name, manifest)
    pid = services[name]["pid"]
    if pid is None:
        raise NoSuchThing(f"service {name} has not run since the boot, and has printed nothing",
                          f"`llmos service start {name}`")  # fmt: skip
    show(ctx, client.logs(int(pid), tail=lines, follow=bool(values.get("follow"))))


def _ls(ctx: Context, services: list[Record], as_json: bool) -> int:
    if as_json:
        ctx.json(services)
        return 0
    now = time.time()
    ctx.lines(table(_COLUMNS, [_row(s, now) for s in services], ctx.width))
    return 0


def _row(s: Record, now: float) -> tuple[str, ...]:
    return (
        s["name"],
        s["state"],
        str(s["pid"] or "-"),
        str(s.get("os_pid") or "-"),
        str(s["restarts"]),
        duration(now - s["since"]) if s.get("since") and s["state"] == "running" else "-",
        size(s["memory_bytes"]) if s["memory_bytes"] else "-",
        _about(s, now),
    )


def _about(s: Record, now: float) -> str:
    """Why it is as it is, where that is not well; else what it is."""
    if s.get("next_start_at"):
        return f"again in {max(0.0, s['next_start_at'] - now):.0f}s: {s['why']}"
    return s["why"] or s.get("about") or s.get("summary") or ""


def _reload(ctx: Context, found: Record, as_json: bool) -> int:
    if as_json:
        ctx.json(found)
        return 0
    for what in ("added", "removed", "changed", "broken"):
        ctx.lines(f"{what}: {thing}" for thing in found[what])
    if not any(found.values()):
        ctx.say("nothing has changed")
    return 0


def _new(ctx: Context, name: str, path: str | None) -> int:
    from llmos.shell.newservice import write

    folder = write(name, Path(path) if path else Path.cwd() / name)
    shown = folder.name if folder.parent == Path.cwd() else str(folder)
    ctx.print(f"wrote {shown}: a service with two calls, and its tests\n")
    ctx.print(f"  pip install -e {shown}\n  pytest {shown}\n  llmos service reload")
    ctx.print(f"  llmos call {name}.greet --who you")
    return 0


COMMAND = Command(
    name="service",
    summary="The supervised services: list, start, stop, read their logs, begin a new one",
    run=run,
    options=(
        Option("action", "what to do; default: ls", positional=True,
               metavar="ACTION", choices=ACTIONS),
        Option("name", "a service", positional=True, metavar="NAME", complete="service"),
        Option("follow", "logs: go on as they grow", type="bool", short="-f"),
        Option("lines", "logs: only the last N lines", type="int", short="-n", minimum=0),
        Option("path", "new: the folder to make; default: ./NAME", complete="path"),
        JSON,
    ),
    details=(
        "stop lasts until start or the next boot; disable stops it for all boots to come, until\n"
        "enable. reload looks for what was installed, changed or removed, without a new kernel.\n"
        "new writes a distribution with a service, its calls and their tests."
    ),
    examples=(
        "llmos service", "llmos service restart weather", "llmos service logs -f weather",
        "llmos service new weather",
    ),
)  # fmt: skip
