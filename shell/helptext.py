"""What `help` and `--help` print, from the same data as the parser. At most 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from llmos.shell.options import Command, Option

WIDTH = 79
_HELP = Option("help", "show this help", type="bool", short="-h")


def usage(command: Command) -> str:
    """The one line that says how a command is written."""
    words = ["llmos", command.name]
    if any(not o.positional for o in command.options):
        words.append("[options]")
    for option in (o for o in command.options if o.positional):
        word = option.shown + ("..." if option.many or option.rest else "")
        words.append(word if option.required else f"[{word}]")
    return " ".join(words)


def command_help(command: Command) -> str:
    """All of `llmos COMMAND --help`."""
    parts = [f"Usage: {usage(command)}", _wrap(command.summary)]
    if command.details:
        parts.append("\n".join(_wrap(line) for line in command.details.split("\n")))
    positionals = [o for o in command.options if o.positional]
    flags = [o for o in command.options if not o.positional]
    if positionals:
        parts.append("Arguments:\n" + _rows((o.shown, describe(o)) for o in positionals))
    own = [o for o in flags if not o.common]
    common = [o for o in flags if o.common]
    parts.append("Options:\n" + _rows((_flag_column(o), describe(o)) for o in [*own, _HELP]))
    if common:
        rows = _rows((_flag_column(o), describe(o)) for o in common)
        parts.append("Options of every program:\n" + rows)
    if command.examples:
        parts.append("Examples:\n" + "\n".join(f"  {line}" for line in command.examples))
    return "\n\n".join(parts) + "\n"


def describe(option: Option) -> str:
    """The help of an option with its choices, limits and default."""
    extra = []
    if option.choices:
        extra.append("one of " + ", ".join(option.choices))
    if option.type == "list" and not option.positional and "repeatable" not in option.help:
        extra.append("repeatable")
    if option.default not in (None, "", False, [], ()):
        shown = f"{option.default:g}" if option.type == "float" else str(option.default)
        extra.append("on unless --no-" + option.flag[2:] if option.default is True else
                     f"default: {shown}")  # fmt: skip
    elif option.required and not option.positional:
        extra.append("required")
    return option.help + (f" ({'; '.join(extra)})" if extra else "")


def groups_help(groups: Iterable[tuple[str, list[tuple[str, str]]]]) -> str:
    """The overview: names and summaries under headings."""
    groups = list(groups)
    width = max((len(name) for _, rows in groups for name, _ in rows), default=0)
    parts = [f"{heading}:\n{_rows(rows, width)}" for heading, rows in groups if rows]
    return "\n\n".join(parts) + "\n"


def _flag_column(option: Option) -> str:
    names = f"{option.short}, {option.flag}" if option.short else option.flag
    return names if option.type == "bool" else f"{names} {option.shown}"


def _rows(rows: Iterable[tuple[str, str]], width: int = 0) -> str:
    rows = list(rows)
    # A long flag stands on a line of its own rather than push all texts to the right.
    width = width or min(max((len(left) for left, _ in rows), default=0), 24)
    return "\n".join(_row(left, right, width) for left, right in rows)


def _row(left: str, right: str, width: int) -> str:
    lines = textwrap.wrap(right, WIDTH - width - 4) or [""]
    indent = " " * (width + 4)
    if len(left) > width:
        return "\n".join([f"  {left}", *(indent + line for line in lines)])
    first = f"  {left.ljust(width)}  {lines[0]}".rstrip()
    return "\n".join([first, *(indent + line for line in lines[1:])])


def _wrap(text: str) -> str:
    return textwrap.fill(text, WIDTH)
