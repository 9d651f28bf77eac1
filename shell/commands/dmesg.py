"""`llmos dmesg`: the kernel's own log."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable

from llmos.kernel.errors import NoKernel, NoSuchThing
from llmos.shell.client import Record
from llmos.shell.context import Context
from llmos.shell.home import Home
from llmos.shell.options import JSON, Command, Option, Usage, Values
from llmos.shell.processes import look_up_pid
from llmos.shell.render import clean

LEVELS = ("debug", "info", "warning", "error")


def run(ctx: Context, values: Values) -> int:
    try:
        return _of_the_kernel(ctx, values)
    except NoKernel:
        lines = from_file(ctx.home) if not values.get("follow") else []
        if not lines:
            raise
        ctx.say("no kernel runs; this is what the last one has written")
        return _show(ctx, values, _select(lines, values))


def _of_the_kernel(ctx: Context, values: Values) -> int:
    with ctx.client(auto_boot=False) as client:
        client.on_lost = lambda: ctx.say("the kernel has gone; `llmos boot` starts it again")
        pid = look_up_pid(client, str(values["pid"])) if values.get("pid") else 0
        lines = client.dmesg(
            pid=pid,
            cause=_cause(values),
            level=values.get("level", "debug" if values.get("cause") else "info"),
            tail=values.get("lines", -1),
            follow=bool(values.get("follow")),
        )
        return _show(ctx, values, lines)


def _show(ctx: Context, values: Values, lines: Iterable[Record]) -> int:
    told = False
    for line in lines:
        told = True
        if values.get("json"):
            ctx.json(line)
        else:
            ctx.print(shown(line))
    if not told and (values.get("pid") or values.get("cause")):
        about = f"process {values['pid']}" if values.get("pid") else f"#{_cause(values)}"
        raise NoSuchThing(f"the log has no line about {about}", "`llmos dmesg` shows all")
    return 0


def _cause(values: Values) -> int:
    """The number of a cause, as the log shows it."""
    text = str(values.get("cause", "")).lstrip("#")
    if text and not text.isdecimal():
        raise Usage(f"--cause is a number, as the log has it after #, not {text!r}")
    return int(text or 0)


def from_file(home: Home) -> list[Record]:
    """What kernels of this home have written, oldest first."""
    lines = []
    for name in ("dmesg.jsonl.1", "dmesg.jsonl"):
        with contextlib.suppress(OSError):
            for text in (home.path / name).read_text(errors="replace").splitlines():
                with contextlib.suppress(ValueError):
                    lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict) and "what" in line]


def _select(lines: list[Record], values: Values) -> list[Record]:
    pid, cause = str(values.get("pid", "")), _cause(values)
    least = LEVELS.index(values.get("level", "info"))
    found = [
        line for line in lines
        if (not pid or pid in (str(line["pid"]), str(line["by"])))
        and (not cause or line["cause"] == cause) and LEVELS.index(line["level"]) >= least
    ]  # fmt: skip
    return found[-values["lines"] :] if values.get("lines") else found


def shown(line: Record) -> str:
    """When, which cause, about whom, what and why; a warning says so."""
    at = time.strftime("%m-%d %H:%M:%S", time.localtime(line["at"]))
    at += f".{int(line['at'] % 1 * 1000):03d}"
    cause = f"#{line['cause']}" if line["cause"] else ""
    who = str(line["pid"] or "")
    mark = {"warning": "! ", "error": "!! "}.get(line["level"], "")
    return clean(f"{at} {cause:>7} {who:>5}  {mark}{line['what']:<12} {line['why']}").rstrip()


COMMAND = Command(
    name="dmesg",
    summary="The kernel's own log: what it did, and what set it off",
    run=run,
    options=(
        Option("pid", "only about this process", metavar="PID", complete="pid"),
        Option("cause", "all that followed from one thing: the number after #", metavar="N"),
        Option("level", "this and above; debug has every turn of a device", choices=LEVELS),
        Option("lines", "only the last N lines", type="int", short="-n", minimum=0),
        Option("follow", "go on as it grows", type="bool", short="-f"),
        JSON,
    ),
    examples=("llmos dmesg -n 20", "llmos dmesg --pid 3", "llmos dmesg --cause 812",
              "llmos dmesg -f --level warning"),
)  # fmt: skip
