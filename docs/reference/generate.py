"""Write the generated parts of the documentation: what the code says, in the pages.

    python docs/reference/generate.py            write them
    python docs/reference/generate.py --check    exit 1 and name the pages that are out of date

A generated part stands between `<!-- generated: NAME -->` and `<!-- /generated -->`. Everything
else in a page is written by hand and left alone. Needs llmos installed; boots nothing, loads no
torch.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_type_hints

import llmos.drivers.base as driver_contract
from llmos.drivers import zygote as zygote_starter
from llmos.drivers.host import driver as host_driver
from llmos.drivers.worker import checkpoint, saving, zygote
from llmos.drivers.worker import main as worker
from llmos.kernel import (
    calls,
    config,
    dmesg,
    errors,
    guests,
    home,
    kernel,
    ledger,
    outgrown,
    packing,
    process,
    protocol,
    reserve,
    restarts,
    retention,
    sched,
    services,
    settings,
    wire,
)
from llmos.kernel.syscalls import checkpoint as checkpoint_call
from llmos.kernel.syscalls import kill, pause
from llmos.services import base as services_base
from llmos.services import isolated, manifest
from llmos.shell import client, commands
from llmos.shell.commands import program
from llmos.shell.helptext import command_help
from llmos.shell.options import Command

DOCS = Path(__file__).resolve().parents[1]
PART = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- /generated -->)", re.DOTALL)
REFRESH = "python docs/reference/generate.py"


# ---- commands ----


def own_manifest() -> dict[str, Any]:
    """The manifest of llmos alone: what else is installed here must not be in our pages."""
    points = [p for p in manifest.entry_points() if p.dist is not None and p.dist.name == "llmos"]
    return manifest.make(points)


def all_commands() -> dict[str, Command]:
    """Every command that `llmos` has without plugins, in the order of `help`."""
    made = own_manifest()
    found: dict[str, Command] = {}
    for name in commands.NAMES:
        command = commands.named(name)
        found[name] = program.unify(command, made) if command.program else command
    for name in made["programs"]:
        command_of = program.program_of(name, made)
        if command_of is not None:
            found[name] = command_of
    return found


def commands_part() -> str:
    sections = (
        f"## {name}\n\n```text\n{command_help(command).rstrip()}\n```\n"
        for name, command in all_commands().items()
    )
    return "\n".join(sections)


# ---- the protocol ----


def calls_part() -> str:
    return "\n".join(_call(name, cls) for name, cls in protocol.REQUESTS.items())


def _call(name: str, cls: type[Any]) -> str:
    text = inspect.cleandoc(cls.__doc__ or "")
    if text.startswith(f"{cls.__name__}("):
        text = ""  # what dataclass writes where nobody wrote anything
    lines = [f"## {name}", ""]
    if name in protocol.STREAMING:
        lines += ["Streams.", ""]
    if text:
        lines += ["```text", text, "```", ""]
    fields = dataclasses.fields(cls)
    if fields:
        hints = get_type_hints(cls)
        notes = _notes(cls)
        rows = [
            (f"`{f.name}`", _type(hints[f.name]), _default(f), notes.get(f.name, ""))
            for f in fields
        ]
        lines += [*_table(("field", "type", "default", ""), rows), ""]
    else:
        lines += ["No fields.", ""]
    return "\n".join(lines)


def _notes(cls: type[Any]) -> dict[str, str]:
    """What the comments beside the fields of a request say."""
    return dict(re.findall(r"^    (\w+): .+?  # (.+)$", inspect.getsource(cls), re.M))


def _type(hint: Any) -> str:
    shown = hint.__name__ if hint in (str, int, float, bool) else str(hint)
    return shown.replace("typing.", "").replace(" | ", " or ")


def _default(f: dataclasses.Field[Any]) -> str:
    if f.default_factory is not dataclasses.MISSING:
        return f"`{f.default_factory()!r}`"
    return "required" if f.default is dataclasses.MISSING else f"`{f.default!r}`"


# ---- states ----


def picture_part() -> str:
    """The states as a mermaid picture, from the table of moves."""
    edges = [
        (a, b)
        for a, targets in process.MOVES.items()
        for b in process.State
        if b in targets and b is not process.State.EXITED
    ]
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> new"]
    lines += [f"    {a} --> {b}" for a, b in edges]
    ends = [a for a, targets in process.MOVES.items() if process.State.EXITED in targets]
    every = len(ends) == len(process.MOVES) - 1
    if every:
        note = "every state may also go to exited"
        lines += ["    exited --> [*]", f"    note right of exited : {note}"]
    else:
        lines += [f"    {a} --> exited" for a in ends] + ["    exited --> [*]"]
    return "\n".join([*lines, "```", ""])


def moves_part() -> str:
    rows = [
        (f"`{a}`", ", ".join(f"`{b}`" for b in process.State if b in targets) or "none")
        for a, targets in process.MOVES.items()
    ]
    return "\n".join([*_table(("from", "to"), rows), ""])


# ---- errors ----


def errors_part() -> str:
    rows = [
        (f"`{code}`", f"`{cls.__name__}`", f"`{cls.__bases__[0].__name__}`", cls.default_hint)
        for code, cls in errors.BY_CODE.items()
    ]
    return "\n".join([*_table(("code", "class", "is a", "default hint"), rows), ""])


# ---- limits ----


def limits_part() -> str:
    s, default = sched.SLICE_S, settings.Settings()
    cls = process.Class
    home_bytes = home.SOCKET_PATH_BYTES - home.LONGEST_INSIDE
    keep = inspect.signature(checkpoint.write).parameters["keep"].default
    measure_s = config.Config.measure_s
    rows = [
        ("one message on a socket", _bytes(wire.MAX_FRAME_BYTES),
         "a prompt of a million tokens fits; refused before it is read"),
        ("answers that wait for a client", _bytes(config.Config.client_buffer),
         "above it the client is not read from, and its streams wait"),
        ("open requests of a client", f"{config.Config.max_open_requests}",
         "more wait in its socket"),
        ("path of the home", f"{home_bytes} bytes",
         f"a unix socket's path has {home.SOCKET_PATH_BYTES} bytes; a worker's is the longest"),
        ("ended processes that are kept",
         f"{retention.KEEP_ROWS:,}, {retention.KEEP_S / 86400:.0f} days",
         "whichever is less; looked at every minute"),
        ("inputs that wait for a guest",
         f"{guests.MOST_INPUTS:,}, {_bytes(guests.MOST_INPUT_BYTES)}",
         "who is so far ahead reads no answers"),
        ("lines in the story of a process", f"{process.STORY_LINES}",
         "the first quarter stays, the middle goes"),
        ("lines of `dmesg`", f"{dmesg.LINES:,}", "in memory; all but leases are in a file, too"),
        ("nice", "-20 to 19", "as Linux; each step is about 1.25 times the share"),
        ("slice: interactive", _s(s[cls.INTERACTIVE]), "a turn among users comes soon"),
        ("slice: batch, idle", f"{_s(s[cls.BATCH])}, {_s(s[cls.IDLE])}",
         "a switch costs about 1 ms and a cold cache"),
        ("being passed in the line for memory", _s(default.passing_s),
         "then no smaller process of its class passes it"),
        ("waiting for memory before all others of the class go after it", _days(default.aging_s),
         "no order of a policy starves anybody for ever"),
        ("stay in memory before equals may displace it", _s(default.min_residency_s),
         f"and {default.residency_moves:.0f} times what its move costs: moving loses a tenth at "
         "most"),
        ("share of batch against interactive work", f"{default.batch_share:.0%}",
         "an average over a minute; `batch_share` in config.toml"),
        ("token gaps of a stream that the share may touch", f"{reserve.TOUCHED:.0%}",
         "one long turn now and then instead of many short ones"),
        ("throughput from which two are packed on a device", f"{packing.WORTH:.2f}",
         "of what they do in turns, measured"),
        ("margin on a measured peak",
         f"{ledger.MARGIN_SHARE:.0%} and {_bytes(ledger.MARGIN_BYTES)}",
         "what it may grow by before the next measurement"),
        ("steps before a measurement counts", f"{outgrown.SETTLED_STEPS}",
         "the first steps allocate"),
        ("interval of measurements", _s(measure_s), "and at every `mem`"),
        ("delay of a restart", f"{_s(restarts.FIRST_S)}, doubled, at most {_s(restarts.LONGEST_S)}",
         "`--restart on-failure` and `always`; services"),
        ("`kill` waits", _s(kill.LIMIT_S), "then timed-out; the signal was sent"),
        ("`pause` waits", _s(pause.LIMIT_S), "until the worker is off the device"),
        ("`checkpoint` waits", _s(checkpoint_call.LIMIT_S), "the process may wait for its turn"),
        ("shutdown waits for workers", _s(kernel.DRAIN_S), "then they are killed"),
        ("checkpoint of a training", f"every {_s(saving.CHECKPOINT_S)}, {keep} kept",
         "what a crash may cost; `--save-every`, `--keep`"),
        ("a worker's last words", _s(worker.LAST_WORDS_S),
         "how long an ended worker waits for the kernel to hear of it"),
        ("a call waits for a service to come up", _s(calls.UP_S),
         "then service-failed; the caller's own limit if that is shorter"),
        ("a call to a service", _s(services_base.CALL_LIMIT_S),
         "or as it declares; then its service has hung and is started again"),
        ("a call of a program or a service waits for its turn", _s(calls.QUEUE_S),
         "beside what the call itself may take"),
        ("memory of a service", _bytes(services_base.MEMORY_BYTES),
         "or as it declares, or `[services.NAME]` in config.toml; then it is started again"),
        ("a service may take to start", _s(services.START_S), "then it is started again"),
        ("a service that was asked to end", _s(host_driver.END_S), "then it is killed"),
        ("importing a plugin", _s(isolated.IMPORT_S),
         "in a process of its own; then it is left out, with its error"),
        ("a client waits for a plain answer", _s(client.ANSWER_S),
         "the kernel answers these in microseconds: silence means that it hangs"),
        ("the zygote may take to start", _s(zygote_starter.START_LIMIT_S),
         "importing torch takes 3 to 10 s"),
        ("a zygote without kernel and workers lives", _s(zygote.LONELY_S), "then it ends"),
    ]  # fmt: skip
    return "\n".join([*_table(("limit", "value", "reason"), rows), ""])


def _days(seconds: float) -> str:
    return f"{seconds / 86400:.0f} days"


def _s(seconds: float) -> str:
    return f"{seconds:g} s"


def _bytes(n: int) -> str:
    return f"{n // 1024**2} MiB"


# ---- the driver contract ----


def driver_methods_part() -> str:
    members = inspect.getmembers(driver_contract.Driver, inspect.isfunction)
    mine = [(n, f) for n, f in members if not n.startswith("_")]
    mine.sort(key=lambda m: m[1].__code__.co_firstlineno)
    rows = [(f"`{n}({_parameters(f)})`", _one_line(f)) for n, f in mine]
    return "\n".join([*_table(("method", "what it does"), rows), ""])


def driver_messages_part() -> str:
    """The messages, as the contract's own text has them."""
    text = inspect.cleandoc(driver_contract.__doc__ or "")
    start = text.index("Between driver and worker")
    return f"```text\n{text[start:]}\n```\n"


def _parameters(f: Callable[..., Any]) -> str:
    return ", ".join(list(inspect.signature(f).parameters)[1:])


def _one_line(f: Callable[..., Any]) -> str:
    return " ".join((inspect.getdoc(f) or "").split()).replace("|", "or")


# ---- pages ----


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [head, tuple("---" for _ in head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


PARTS: dict[str, Callable[[], str]] = {
    "commands": commands_part,
    "calls": calls_part,
    "states-picture": picture_part,
    "moves": moves_part,
    "errors": errors_part,
    "limits": limits_part,
    "driver-methods": driver_methods_part,
    "driver-messages": driver_messages_part,
}


def fill(text: str) -> str:
    """A page with its generated parts made anew. KeyError for a part that nobody makes."""
    return PART.sub(lambda m: m[1] + "\n" + PARTS[m[2]]() + "\n" + m[3], text)


def pages() -> list[Path]:
    return sorted(p for p in DOCS.rglob("*.md") if PART.search(p.read_text(encoding="utf-8")))


def main(argv: list[str]) -> int:
    stale = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        made = fill(text)
        if made == text:
            continue
        stale.append(page.relative_to(DOCS).as_posix())
        if "--check" not in argv:
            page.write_text(made, encoding="utf-8")
    for name in stale:
        sys.stdout.write(f"{name} {'is out of date' if '--check' in argv else 'written'}\n")
    return 1 if stale and "--check" in argv else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
