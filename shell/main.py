"""`llmos`: finds the command, runs it, and turns every error into one line and an exit status.

0: done; 1: the thing failed; 2: the command line makes no sense; 130: Ctrl-C; a program's own
exit status where one was waited for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from llmos.kernel.errors import LlmosError
from llmos.shell import commands
from llmos.shell.context import Context
from llmos.shell.options import Command, Usage, parse

INTERRUPTED = 130
BROKEN_PIPE = 141  # 128 + SIGPIPE, as any Unix tool whose reader has gone
HELP_FLAGS = ("--help", "-h")


def main() -> None:
    """The console script."""
    try:
        status = guarded(sys.argv[1:], Context())
        sys.stdout.flush()
    except BrokenPipeError:
        status = BROKEN_PIPE
    if status == BROKEN_PIPE:
        # The interpreter flushes stdout once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


Run = Callable[[list[str], Context], int]


def guarded(argv: list[str], ctx: Context, run: Run | None = None) -> int:
    """Run a command line; whatever goes wrong becomes a message and an exit status."""
    try:
        return (run or dispatch)(argv, ctx)
    except Usage as exc:
        complain(ctx, exc.message, exc.hint)
        return 2
    except LlmosError as exc:
        complain(ctx, exc.message, exc.hint)
        return 1
    except KeyboardInterrupt:
        ctx.say("")
        return INTERRUPTED
    except BrokenPipeError:
        return BROKEN_PIPE
    except OSError as exc:
        complain(ctx, str(exc), "")
        return 1
    except Exception as exc:
        if os.environ.get("LLMOS_DEBUG"):
            raise
        hint = "this is a bug in llmos: LLMOS_DEBUG=1 shows where; please report it"
        complain(ctx, f"{type(exc).__name__}: {exc}", hint)
        return 1


def complain(ctx: Context, message: str, hint: str) -> None:
    """An error for the person: one line, and what to do."""
    ctx.say(f"llmos: {message}")
    if hint:
        ctx.say(f"  {hint}")


def dispatch(argv: list[str], ctx: Context) -> int:
    """Run a command line. Raises Usage and LlmosError."""
    if not argv:
        if ctx.interactive:
            return 0
        from llmos.shell.repl import start

        return start(ctx)
    words = [*commands.ALIASES.get(argv[0], (argv[0],)), *argv[1:]]
    name, rest = words[0], words[1:]
    if name in HELP_FLAGS:
        name = "help"
    if name in ("--version", "-V"):
        name = "version"
    command = find(ctx, name)
    if wants_help(command, rest):
        from llmos.shell.helptext import command_help

        ctx.print(command_help(command).rstrip("\n"))
        return 0
    try:
        values = parse(command.options, command.prepare(rest))
    except Usage as exc:
        hint = exc.hint or f"`llmos {command.name} --help` shows how"
        raise Usage(exc.message, hint) from None
    return command.run(ctx, values)


def wants_help(command: Command, argv: list[str]) -> bool:
    """Is there a --help that is the command's own, and not of the command line that it runs?"""
    takes_rest = any(o.rest for o in command.options)
    with_value = {f for o in command.options if o.type != "bool" for f in (o.flag, o.short) if f}
    value = False
    for word in argv:
        if word in HELP_FLAGS:
            return True
        if word == "--" or (takes_rest and not value and not word.startswith("-")):
            return False
        value = word in with_value
    return False


def find(ctx: Context, name: str) -> Command:
    """The command of that name: a built-in one, or a program. Raises Usage, NoKernel."""
    command = commands.named(name) if name in commands.NAMES else None
    if command is not None and not command.program:
        return command
    from llmos.shell.commands.program import program_command, verb_of_program

    return verb_of_program(ctx, command) if command else program_command(ctx, name)
