"""`llmos explain`: why a process is where it is."""

from __future__ import annotations

import time

from llmos.shell.client import Record
from llmos.shell.context import Context
from llmos.shell.options import JSON, PID, Command, Values
from llmos.shell.processes import look_up_pid
from llmos.shell.render import clean, duration, size


def run(ctx: Context, values: Values) -> int:
    with ctx.client() as client:
        found = client.explain(look_up_pid(client, values["pid"]))
    if values.get("json"):
        ctx.json(found)
        return 0
    ctx.lines(explanation(found, time.time()))
    return 0


def explanation(found: Record, now: float) -> list[str]:
    """The state, the place in the queue, the story, and what can be done."""
    p = found["process"]
    name = f" {p['name']!r}" if p["name"] else ""
    lines = [f"{p['program']} {p['pid']}{name} of {p['user']} is {state_phrase(p)}"]
    if found.get("reason"):
        lines.append(f"reason: {clean(found['reason'])}")
    if found.get("queue_place") is not None:
        lines.append(f"place in the queue: {found['queue_place']}")
    memory, times = p["memory"], p.get("preemptions", 0)
    taken = f"{size(memory['measured_bytes'])} of {size(memory['promised_bytes'])} promised"
    if p["state"] == "exited":
        taken = (
            f"{size(memory['peak_bytes'])} at its peak" if memory["peak_bytes"] else "not measured"
        )
    elif memory["peak_bytes"]:
        taken += f", {size(memory['peak_bytes'])} at its peak"
    lines.append(
        f"device time {duration(p['device_seconds'])}, memory {taken}, "
        f"preempted {times} time{'' if times == 1 else 's'}"
    )
    lines.append("")
    lines += [_story_line(entry, now) for entry in found.get("story", [])]
    lines += _from_the_log(found.get("log") or [], p["pid"], now)
    advice = found.get("advice") or []
    return lines + (["", *(f"-> {clean(a)}" for a in advice)] if advice else [])


def _from_the_log(log: list[Record], pid: int, now: float) -> list[str]:
    """The lines that something else has set off than the process itself."""
    others = [line for line in log if line["because"] and line["what"] not in line["because"]]
    if not others:
        return []
    lines = ["", "in the kernel's log, with what set it off (`llmos dmesg --cause N` has it all):"]
    for line in others[-6:]:
        ago = duration(max(0.0, now - line["at"]))
        what = f"{line['what']} {line['why']}".strip()
        lines.append(clean(f"{ago:>9} ago  #{line['cause']:<4} {what}  <- {line['because']}"))
    return lines


def state_phrase(p: Record) -> str:
    """The state, with the device or the exit status."""
    if p["state"] == "exited":
        return f"exited with status {p['exit_status']}"
    return str(p["state"]) + (f" on {p['device']}" if p["device"] else "")


def _story_line(entry: Record, now: float) -> str:
    ago = duration(max(0.0, now - entry["at"]))
    return f"{ago:>9} ago  {entry['what']:<10} {clean(entry['why'])}".rstrip()


COMMAND = Command(
    name="explain",
    summary="Why a process is where it is: its story, its place in the queue",
    run=run,
    options=(PID, JSON),
    examples=("llmos explain 3",),
)
