"""`llmos explain`: why a process is where it is."""

from __future__ import annotations

import time

from llmos.shell.client import Record
from llmos.shell.context import Context
from llmos.shell.options import JSON, PID, Command, Values
from llmos.shell.processes import find_pid
from llmos.shell.render import clean, duration, size


def run(ctx: Context, values: Values) -> int:
    with ctx.client() as client:
        found = client.explain(find_pid(client, values["pid"]))
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
    memory = p["memory"]
    lines.append(
        f"device time {duration(p['device_seconds'])}, memory {size(memory['measured_bytes'])} "
        f"of {size(memory['promised_bytes'])} promised, preempted {p.get('preemptions', 0)} times"
    )
    lines.append("")
    lines += [_story_line(entry, now) for entry in found.get("story", [])]
    advice = found.get("advice") or []
    return lines + (["", *(f"-> {clean(a)}" for a in advice)] if advice else [])


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
