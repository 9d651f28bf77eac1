"""Command lines as data: one schema gives the parser, `--help` and the completion.

The schema of a program in the manifest and the options of a built-in command are the same kind
of data, so a plugin's flags behave like ours. argparse is not used: it cannot take a positional
after a flag that follows another one (`run MODEL --max-tokens 5 "PROMPT"`), nor suggest a name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmos.kernel.errors import BadArgument
from llmos.kernel.units import parse_duration
from llmos.shell.resolve import nearest_hint

if TYPE_CHECKING:
    from llmos.shell.context import Context

Values = dict[str, Any]

_NUMBER = re.compile(r"-\d+(\.\d+)?([eE][-+]?\d+)?$")


class Usage(Exception):
    """The command line makes no sense: exit status 2."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


@dataclass(frozen=True)
class Option:
    """A flag or a positional argument. `type`: str, int, float, bool, list, duration or
    any (JSON, or @FILE with JSON in it).

    `complete` names what can stand there: pid, model, path, program, command, service, signal,
    executable (then paths).
    A positional with `many` takes all that follow; with `rest` also what looks like flags.
    """

    name: str
    help: str
    type: str = "str"
    short: str = ""
    positional: bool = False
    required: bool = False
    many: bool = False
    rest: bool = False
    default: Any = None
    choices: tuple[str, ...] = ()
    metavar: str = ""
    complete: str = ""
    minimum: float | None = None
    maximum: float | None = None
    common: bool = False  # every program takes it: under a heading of its own in help

    @property
    def flag(self) -> str:
        # What is written as 5m has its unit with it.
        name = self.name.removesuffix("_s") if self.type == "duration" else self.name
        return "--" + name.replace("_", "-")

    @property
    def shown(self) -> str:
        """The name of the value in help: `--steps N`."""
        if self.metavar:
            return self.metavar
        kinds = {"int": "N", "float": "X", "duration": "TIME", "any": "JSON"}
        return self.name.upper() if self.positional else kinds.get(self.type, self.name.upper())

    @property
    def label(self) -> str:
        """How messages name it."""
        return self.shown if self.positional else self.flag


@dataclass(frozen=True)
class Command:
    """A verb of the shell: what `llmos NAME` takes and what it does."""

    name: str
    summary: str
    run: Callable[[Context, Values], int]
    options: tuple[Option, ...] = ()
    details: str = ""
    examples: tuple[str, ...] = ()
    # The program that this verb runs: its arguments and examples come from the manifest.
    program: str = ""
    # Arguments of the program that the verb finds elsewhere when they are not given.
    optional: tuple[str, ...] = ()
    # Rewrites arguments that no schema describes (`kill -9`) before they are parsed.
    prepare: Callable[[list[str]], list[str]] = field(default=list)


JSON = Option("json", "print JSON, for scripts", type="bool")
PID = Option(
    "pid", "pid or name of a process", positional=True, required=True, metavar="PID",
    complete="pid",
)  # fmt: skip
PIDS = Option(
    "pids", "pids or names of processes", positional=True, required=True, many=True,
    metavar="PID", complete="pid",
)  # fmt: skip


def from_schema(schema: dict[str, Any]) -> tuple[Option, ...]:
    """The options of a program, from its schema in the manifest."""
    return tuple(_from_field(f) for f in schema["args"])


def _from_field(f: dict[str, Any]) -> Option:
    kind = f["type"].rstrip("?")
    complete = "model" if f.get("model") else "path" if f.get("path") else ""
    complete = "executable" if f.get("command") else complete
    return Option(
        name=f["name"],
        help=f["help"],
        type="duration" if f.get("duration") else kind,
        positional=bool(f.get("positional")),
        required=bool(f["required"]),
        many=kind == "list" and bool(f.get("positional")) and not f.get("command"),
        rest=bool(f.get("command")),
        default=f["default"],
        choices=tuple(f.get("choices") or ()),
        metavar=f.get("metavar") or "",
        complete=complete,
        minimum=f.get("minimum"),
        maximum=f.get("maximum"),
    )


def parse(options: Sequence[Option], argv: Sequence[str]) -> Values:
    """The values that were given, by name; what was not given is absent. Raises Usage."""
    parser = _Parser(options)
    parser.read(list(argv))
    for option in options:
        if option.required and option.name not in parser.values:
            raise Usage(f"{option.label} is missing: {option.help}")
    return parser.values


class _Parser:
    def __init__(self, options: Sequence[Option]) -> None:
        self.values: Values = {}
        self._positionals = [o for o in options if o.positional]
        flags = [o for o in options if not o.positional]
        self._flags = {"--" + o.name.replace("_", "-"): o for o in flags}
        self._flags |= {o.flag: o for o in flags}
        self._shorts = {o.short: o for o in options if o.short}

    def read(self, argv: list[str]) -> None:
        while argv:
            word = argv.pop(0)
            if word == "--":
                if self._next_positional().rest and argv:
                    self.values[self._next_positional().name] = list(argv)
                else:
                    self._take_positionals(argv)
                return
            if self._is_flag(word):
                self._take_flag(word, argv)
            elif self._next_positional().rest:
                self.values[self._next_positional().name] = [word, *argv]
                return
            else:
                self._take_positional(word)

    def _is_flag(self, word: str) -> bool:
        if not word.startswith("-") or word == "-" or " " in word:
            return False  # "-" is standard input; a prompt may begin with a dash
        return word in self._shorts or not _NUMBER.match(word)

    def _take_positionals(self, argv: list[str]) -> None:
        for word in argv:
            self._take_positional(word)

    def _next_positional(self) -> Option:
        for option in self._positionals:
            if option.many or option.rest or option.name not in self.values:
                return option
        return Option("", "")

    def _take_positional(self, word: str) -> None:
        option = self._next_positional()
        if not option.name:
            raise Usage(f"one argument too many: {word!r}", "put quotes around text with spaces")
        value = convert(option, word)
        if option.many:
            self.values.setdefault(option.name, []).append(value)
        else:
            self.values[option.name] = value

    def _take_flag(self, word: str, argv: list[str]) -> None:
        name, equals, value = word.partition("=")
        option, on = self._find(name)
        if option is None and not word.startswith("--") and word[:2] in self._shorts:
            option, equals, value = self._shorts[word[:2]], "=", word[2:]  # -n5
            if option.type == "bool":  # -af: several at once
                argv.insert(0, "-" + value)
                equals = ""
        if option is None:
            raise Usage(f"there is no flag {name}", self._flag_hint(name))
        if option.type == "bool":
            if equals:
                raise Usage(f"{name} takes no value")
            self.values[option.name] = on
            return
        if not equals:
            if not argv:
                raise Usage(f"{name} needs a value: {option.help}")
            value = argv.pop(0)
        self._store(option, value)

    def _store(self, option: Option, value: str) -> None:
        if option.type == "list":
            self.values.setdefault(option.name, []).append(convert(option, value))
        else:
            self.values[option.name] = convert(option, value)

    def _find(self, name: str) -> tuple[Option | None, bool]:
        if name in self._shorts:
            return self._shorts[name], True
        name = name.replace("_", "-")
        if name in self._flags:
            return self._flags[name], True
        negated = self._flags.get("--" + name.removeprefix("--no-"))
        if name.startswith("--no-") and negated is not None and negated.type == "bool":
            return negated, False
        return None, False

    def _flag_hint(self, name: str) -> str:
        return nearest_hint(name, ["--help", *self._flags, *self._shorts])


def convert(option: Option, word: str) -> Any:
    """The value that a word means for an option. Raises Usage."""
    if option.choices and word not in option.choices:
        label = option.name if option.positional else option.flag
        raise Usage(
            f"{label} is one of {', '.join(option.choices)}, not {word!r}",
            nearest_hint(word, option.choices) if len(option.choices) > 1 else "",
        )
    match option.type:
        case "int" | "float":
            return _number(option, word)
        case "duration":
            return _duration(option, word)
        case "any":
            return _json(option, word)
        case _:
            return word


def _json(option: Option, word: str) -> Any:
    try:
        text = Path(word[1:]).read_text() if word.startswith("@") else word
        return json.loads(text)
    except OSError as exc:
        raise Usage(f"{option.label}: {word[1:]} cannot be read: {exc.strerror}") from None
    except UnicodeDecodeError:
        raise Usage(f"{option.label}: {word[1:]} is not UTF-8 text") from None
    except ValueError as exc:
        is_file = len(word) < 4096 and "\0" not in word and os.path.isfile(word)
        file = f"@{word}" if is_file else "@FILE"
        raise Usage(
            f"{option.label} takes JSON: {exc}", f"write it in quotes, or give a file as {file}"
        ) from None


def _check_limits(option: Option, word: str, value: float) -> None:
    unit = " s" if option.type == "duration" else ""
    if option.minimum is not None and value < option.minimum:
        raise Usage(f"{option.label} is at least {option.minimum:g}{unit}, not {word}")
    if option.maximum is not None and value > option.maximum:
        raise Usage(f"{option.label} is at most {option.maximum:g}{unit}, not {word}")


def _number(option: Option, word: str) -> float:
    try:
        value = int(word) if option.type == "int" else float(word)
    except ValueError:
        kind = "a whole number" if option.type == "int" else "a number"
        raise Usage(f"{option.label} takes {kind}, not {word!r}") from None
    _check_limits(option, word, value)
    return value


def _duration(option: Option, word: str) -> float:
    seconds = duration_s(word)
    if seconds is None or (seconds < 0 and option.minimum is None):
        raise Usage(f"{option.label} takes a time such as 30s, 5m or 2h, not {word!r}")
    _check_limits(option, word, seconds)
    return seconds


def duration_s(word: str) -> float | None:
    """Seconds of "5m", "1h30m", "1.5s" or "20"; None when it is not a time."""
    try:
        return parse_duration(word)
    except BadArgument:
        return None
