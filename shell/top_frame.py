"""What `top` shows, as text: a snapshot and the person's choices in, styled lines out.

Knows no terminal and no socket: the tests read its lines, `top --once` prints them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llmos.shell.client import Record
from llmos.shell.processes import COLUMNS, row
from llmos.shell.render import bar, clean, duration, fit, plural, size, table

Line = tuple[str, str]  # a prompt_toolkit style and a text

EVENT_LINES = 4
# What of the kernel's record is worth a line here: who took the device from whom, and ends.
SHOWN_EVENTS = frozenset({"preempted", "exited", "evicted", "restored", "checkpoint", "backoff"})

_STATES = ("running", "ready", "starting", "planning", "new", "preempted", "waiting", "backoff",
           "stopping", "paused", "exited")  # fmt: skip


def _place(state: str) -> int:
    return _STATES.index(state) if state in _STATES else len(_STATES)


SORTS: dict[str, Callable[[Record], Any]] = {
    "pid": lambda p: p["pid"],
    # Services serve all the time: who competes for a device comes first.
    "state": lambda p: (p.get("role") == "service", _place(p["state"])),
    "mem": lambda p: -(p["memory"]["measured_bytes"] or p["memory"]["promised_bytes"]),
    "time": lambda p: -p["device_seconds"],
    "nice": lambda p: p["nice"],
    "name": lambda p: (p["program"], p["name"]),
}
KEYS = "q quit  h help  / filter  o sort  k kill  F7 F8 nice  p pause"
HELP = (
    "Keys of top",
    "",
    "  up down       choose a process          space   tag it (again: untag)",
    "  k, F9         kill it, or the tagged    p       pause or resume",
    "  F7 F8         nice -1 (more important), nice +1 (less)",
    "  o > <         next or previous sort column",
    "  /             show only what contains a text; Enter keeps it, Esc drops it",
    "  Enter, e      why it is where it is",
    "  h ?           this help                 q       leave",
    "",
    "TIME is time on the device. MEM is measured; ~: promised, not measured yet.",
)


@dataclass
class Choices:
    """What the person has chosen; the snapshot changes under it."""

    sort: str = "state"
    filter: str = ""
    pid: int = 0  # the process that is chosen
    tagged: set[int] = field(default_factory=set)

    def next_sort(self, by: int) -> None:
        names = list(SORTS)
        self.sort = names[(names.index(self.sort) + by) % len(names)]

    def settle(self, processes: list[Record]) -> None:
        """Only what is shown can be chosen or tagged: a key must not hit what nobody sees."""
        pids = [p["pid"] for p in processes]
        self.tagged.intersection_update(pids)
        if self.pid not in pids:
            self.pid = pids[0] if pids else 0

    def move(self, processes: list[Record], by: int) -> None:
        """Choose the process `by` rows further down."""
        self.settle(processes)
        pids = [p["pid"] for p in processes]
        if pids:
            self.pid = pids[max(0, min(len(pids) - 1, pids.index(self.pid) + by))]

    def targets(self) -> list[int]:
        """What a key acts on: the tagged, else the chosen one."""
        return sorted(self.tagged) or ([self.pid] if self.pid else [])


@dataclass(frozen=True)
class Snapshot:
    """What the kernel said last."""

    status: Record
    processes: list[Record]
    mem: list[Record]
    events: list[Record]


def visible(snapshot: Snapshot, choices: Choices) -> list[Record]:
    """The processes in the order in which they are shown."""
    wanted = choices.filter.lower()
    found = [p for p in snapshot.processes if wanted in " ".join(row(p)).lower()]
    return sorted(found, key=lambda p: (SORTS[choices.sort](p), p["pid"]))


def frame(snapshot: Snapshot, choices: Choices, width: int, height: int, now: float) -> list[Line]:
    """All lines but the last, which belongs to messages and keys."""
    head = header(snapshot, width)
    rows = visible(snapshot, choices)
    events = event_lines(snapshot.events, now, width)
    room = height - len(head) - 1 - (len(events) + 1 if events else 0)
    lines = [*head, *_table(rows, choices, width, max(1, room))]
    if events:
        lines += [("", "")] * max(0, height - len(lines) - len(events) - 1)
        lines += [("class:head", fit("LAST DECISIONS", width)), *events]
    return lines[:height]


def header(snapshot: Snapshot, width: int) -> list[Line]:
    """The kernel, and a line for each device with its load and its memory."""
    kernel = snapshot.status["kernel"]
    states = {s: n for s, n in (snapshot.status.get("processes") or {}).items() if n}
    counts = ", ".join(f"{n} {s}" for s, n in states.items() if s != "exited")
    lines = [
        f"llmos {kernel['version']}  up {duration(kernel['uptime_s'])}  "
        f"{plural(len(snapshot.processes), 'process')}" + (f": {counts}" if counts else "")
    ]
    books = {d["device"]: d for d in snapshot.mem}
    lines += [_device(d, books.get(d["device"]), width) for d in snapshot.status["devices"]]
    return [("", fit(line, width)) for line in lines] + [("", "")]


def _device(d: Record, books: Record | None, width: int) -> str:
    # Half of what the words leave for each of the two bars.
    cells = max(4, min(20, (width - 52) // 2))
    load = float(d.get("load") or 0.0)
    text = f"{d['device']:<6} load {bar(load, cells)} {load:4.0%}"
    if books is not None and books["capacity_bytes"]:
        used = books["capacity_bytes"] - books["free_bytes"]
        share = used / books["capacity_bytes"]
        text += f"  mem {bar(share, cells)} {size(used)}/{size(books['capacity_bytes'])}"
    return text + (f"  pid {d['running_pid']}" if d.get("running_pid") else "  idle")


def _table(rows: list[Record], choices: Choices, width: int, room: int) -> list[Line]:
    texts = table(COLUMNS, [row(p) for p in rows], width - 1)
    lines: list[Line] = [("class:head", fit(" " + texts[0], width))]
    at = next((i for i, p in enumerate(rows) if p["pid"] == choices.pid), 0)
    # Keep the chosen one in sight.
    first = max(0, min(at - room + 1, len(rows) - room))
    for p, text in list(zip(rows, texts[1:], strict=True))[first : first + room]:
        mark = "*" if p["pid"] in choices.tagged else " "
        lines.append((_style(p, choices), fit(mark + text, width)))
    return lines


def _style(p: Record, choices: Choices) -> str:
    if p["pid"] == choices.pid:
        return "class:chosen"
    if p["state"] in ("running", "preempted", "paused", "backoff"):
        return f"class:{p['state']}"
    return "class:ended" if p["state"] == "exited" else ""


def event_lines(events: list[Record], now: float, width: int) -> list[Line]:
    """The last decisions that changed who runs, the newest at the bottom."""
    shown = [e for e in events if e["what"] in SHOWN_EVENTS][-EVENT_LINES:]
    return [("class:event", fit(_event(e, now), width)) for e in shown]


def _event(e: Record, now: float) -> str:
    who = f"{e['pid']} {e['what']}" + (f" by {e['by']}" if e.get("by") else "")
    return f"{duration(max(0.0, now - e['at'])):>8} ago  {who:<18} {clean(e.get('why') or '')}"
