"""`llmos kill`: end processes, or send them a signal."""

from __future__ import annotations

import signal

from llmos.kernel.errors import LlmosError
from llmos.shell.context import Context
from llmos.shell.options import PIDS, Command, Option, Usage, Values
from llmos.shell.processes import find_pid
from llmos.shell.resolve import nearest_hint

# What a person sends to a process; the rest of the system's signals have no meaning here.
SIGNALS: dict[str, int] = {name: getattr(signal, f"SIG{name}").value for name in
           ("HUP", "INT", "QUIT", "KILL", "TERM", "STOP", "CONT", "USR1", "USR2")}  # fmt: skip


def prepare(argv: list[str]) -> list[str]:
    """-9 and -TERM, as every kill takes them, become --signal."""
    made: list[str] = []
    for word in argv:
        name = word[1:].upper().removeprefix("SIG")
        if word.startswith("-") and (name in SIGNALS or name.isdigit()):
            made += ["--signal", name]
        else:
            made.append(word)
    return made


def signal_number(word: str) -> int:
    """9, KILL and SIGKILL are the same. Raises Usage."""
    name = word.upper().removeprefix("SIG")
    if name in SIGNALS:
        return SIGNALS[name]
    if name.isdigit() and 1 <= int(name) <= signal.NSIG:
        return int(name)
    raise Usage(f"there is no signal {word!r}", nearest_hint(name, SIGNALS))


def run(ctx: Context, values: Values) -> int:
    number = signal_number(values.get("signal", "TERM"))
    status = 0
    with ctx.client() as client:
        for word in values["pids"]:
            try:
                client.kill(find_pid(client, word), number)
            except LlmosError as exc:
                # As any kill: the others get their signal all the same.
                ctx.say(f"llmos: {exc.message}" + (f"\n  {exc.hint}" if exc.hint else ""))
                status = 1
    return status


COMMAND = Command(
    name="kill",
    summary="End processes; returns when they have ended",
    run=run,
    prepare=prepare,
    options=(
        PIDS,
        Option("signal", "which signal; default: TERM", short="-s", metavar="SIGNAL",
               complete="signal"),
    ),
    details="TERM, INT and KILL end a process; STOP and CONT are `pause` and `resume`. "
    "A process ended by signal n has exit status 128+n.",
    examples=("llmos kill 3", "llmos kill -9 3 4", "llmos kill -STOP my-run"),
)  # fmt: skip
