"""Processes as rows of a table, and pids as people name them. Shared by ps and top."""

from __future__ import annotations

import time
from collections.abc import Sequence

from llmos.shell.client import Client, Record
from llmos.shell.render import Column, count, duration, size, table
from llmos.shell.resolve import pid_of

COLUMNS = (
    Column("PID", right=True),
    Column("USER", shrink=4),
    Column("PROG", shrink=4),
    Column("NAME", shrink=4),
    Column("STATE"),
    Column("CLASS"),
    Column("NI", right=True),
    Column("DEV"),
    Column("MEM", right=True),
    Column("TIME", right=True),
    Column("PROGRESS", right=True),
    Column("REASON", shrink=6),
)
_CLASS = {"interactive": "inter"}


def process_table(processes: Sequence[Record], width: int) -> list[str]:
    """The table of `ps`, header first, at most `width` columns (0: no limit)."""
    return table(COLUMNS, [row(p) for p in processes], width)


def row(p: Record) -> tuple[str, ...]:
    """One process; the columns are COLUMNS."""
    state = str(p["state"]) if p["exit_status"] in (None, 0) else f"exit {p['exit_status']}"
    return (
        str(p["pid"]),
        p["user"],
        p["program"],
        p["name"] or "-",
        state,
        str(_CLASS.get(p["class"], p["class"])),
        str(p["nice"]),
        p["device"] or "-",
        memory(p),
        duration(p["device_seconds"]),
        progress(p),
        reason(p),
    )


def reason(p: Record) -> str:
    """Why it does not run; of one that has failed also when it is started again."""
    due = p.get("next_start_at") if p["state"] == "backoff" else None
    return f"again in {duration(max(0.0, due - time.time()))}" if due else p["reason"] or ""


def memory(p: Record) -> str:
    """Measured; what is only promised so far has a tilde."""
    m = p["memory"]
    if m["measured_bytes"]:
        return size(m["measured_bytes"])
    return f"~{size(m['promised_bytes'])}" if m["promised_bytes"] else "-"


def progress(p: Record) -> str:
    """How far it is: a share where the end is known, else the step."""
    made = p.get("progress") or {}
    if not made.get("step") or p.get("role") == "engine":
        return "-"  # an engine's steps are its guests' tokens
    step, total = made["step"], made.get("total")
    if not total:
        return str(step) if step < 100_000 else count(step)
    return f"{step}/{total}" if total < 100_000 else f"{step / total:.1%}"


def find_pid(client: Client, word: str) -> int:
    """The pid that a word means: a number, or a name; of ended processes the last one's."""
    if word.isdigit():
        return int(word)
    live = client.ps()
    if any(p["name"] == word for p in live):
        return pid_of(live, word)
    return look_up_pid(client, word)


def look_up_pid(client: Client, word: str) -> int:
    """As `find_pid`, for what is only looked at: the process that made a model, alive or not, and
    not somebody who asked the model something and is called as it is."""
    if word.isdigit():
        return int(word)
    named = [p for p in client.ps(all=True) if p["name"] == word]
    made = [p for p in named if p["role"] == "process"] or named
    return pid_of([p for p in made if p["state"] != "exited"] or made[-1:], word)
