"""Completion in the interactive shell: commands, flags, choices, pids, models, services, files.

Works from what the poller knows and the same schemas as the parser; never asks the kernel itself.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from llmos.shell import commands
from llmos.shell.commands.call import command_of
from llmos.shell.commands.kill import SIGNALS
from llmos.shell.commands.program import program_of, unify
from llmos.shell.options import Command, Option
from llmos.shell.poller import Known
from llmos.shell.processes import progress

_LAST_WORD = re.compile(r"(?:[^\s\"']|\"[^\"]*\"|'[^']*')*$")

BUILTINS = {
    "jobs": "the processes that were started here",
    "fg": "bring a process to the foreground",
    "exit": "leave; what runs goes on",
    "clear": "clear the screen",
}


class ShellCompleter(Completer):
    """`known` gives what the poller heard last; `trouble` takes the note of a bug."""

    def __init__(self, known: Callable[[], Known], trouble: Callable[[str], None]) -> None:
        self._known = known
        self._trouble = trouble
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        try:
            yield from self._complete(document.text_before_cursor, event)
        except Exception as exc:  # noqa: BLE001  a bug here must not end the session
            self._trouble(f"completion failed: {type(exc).__name__}: {exc}")

    def _complete(self, text: str, event: CompleteEvent) -> Iterator[Completion]:
        found = _LAST_WORD.search(text)
        word = found[0] if found else ""
        try:
            before = shlex.split(text[: len(text) - len(word)])
        except ValueError:
            return  # inside an open quote
        known = self._known()
        if before[:1] == ["llmos"]:
            before = before[1:]
        # `nice -n 5 pretrain ...` completes as what it runs.
        command, rest = self._command(known, before)
        if command is None:
            if not before or before[0] == "nice":
                yield from _matching(word, self._commands(known).items())
            return
        yield from self._arguments(known, command, rest, word, event)

    def _arguments(
        self, known: Known, command: Command, before: list[str], word: str, event: CompleteEvent
    ) -> Iterator[Completion]:
        flags = {o.flag: o for o in command.options if not o.positional}
        flags |= {o.short: o for o in command.options if o.short}
        waiting = flags.get(before[-1]) if before else None
        rest = _rest(command.options, flags, before)
        if rest is not None:
            yield from self._values(known, rest, word, event)
        elif waiting is not None and waiting.type != "bool":
            yield from self._values(known, waiting, word, event)
        elif word.startswith("-"):
            shown = {o.flag: o.help for o in command.options if not o.positional}
            yield from _matching(word, {**shown, "--help": "show the help"}.items())
        else:
            option = _next_positional(command.options, flags, before)
            if option is not None:
                yield from self._values(known, option, word, event)

    def _values(
        self, known: Known, option: Option, word: str, event: CompleteEvent
    ) -> Iterator[Completion]:
        if option.choices:
            yield from _matching(word, ((c, "") for c in option.choices))
        match option.complete:
            case "pid":
                yield from _matching(word, _pids(known))
            case "model":
                yield from _matching(word, ((m, "model") for m in known.models))
                yield from self._files(word, event)
            case "path" | "executable":
                yield from self._files(word, event)
            case "signal":
                yield from _matching(word, ((s, "") for s in SIGNALS))
            case "service":
                services = (known.manifest or {}).get("services", {})
                yield from _matching(word, ((n, s["summary"]) for n, s in services.items()))
            case "method":
                yield from _matching(word, _methods(known))
            case "topic":
                yield from _matching(word, self._commands(known).items())
                services = (known.manifest or {}).get("services", {})
                yield from _matching(word, ((n, s["summary"]) for n, s in services.items()))
                yield from _matching(word, _methods(known) if "." in word else ())
            case "command":
                yield from _matching(word, self._commands(known).items())

    def _files(self, word: str, event: CompleteEvent) -> Iterator[Completion]:
        yield from self._paths.get_completions(Document(word), event)

    def _commands(self, known: Known) -> dict[str, str]:
        ours = {name: commands.named(name).summary for name in commands.NAMES}
        programs = (known.manifest or {"programs": {}})["programs"]
        theirs = {
            name: s["summary"]
            for name, s in programs.items()
            if not s["hidden"] and name not in commands.PROGRAM_VERBS
        }
        return dict(sorted({**ours, **theirs, **BUILTINS}.items()))

    def _command(self, known: Known, before: list[str]) -> tuple[Command | None, list[str]]:
        """The command that is being written, and its words so far."""
        if before[:1] == ["nice"]:
            rest = before[1:]
            while rest and (rest[0].startswith("-") or rest[0].isdigit()):
                rest = rest[1:]
            return self._command(known, rest) if rest else (None, [])
        if not before:
            return None, []
        name, rest = before[0], before[1:]
        manifest = known.manifest or {"programs": {}}
        if name == "call" and rest and "." in rest[0]:
            return _call(manifest, rest)
        if name == "fg":
            return commands.named("attach"), rest
        if name in commands.NAMES:
            command = commands.named(name)
            verb = command.program and command.program in manifest["programs"]
            return (unify(command, manifest) if verb else command), rest
        return program_of(name, manifest), rest


def _call(manifest: dict[str, Any], words: list[str]) -> tuple[Command | None, list[str]]:
    """The call that is being written, with its own flags, and the words after its name."""
    method, rest = words[0], words[1:]
    service, _, name = method.partition(".")
    described = manifest.get("services", {}).get(service, {}).get("calls", {}).get(name)
    if described is None:
        return commands.named("call"), words
    return command_of(method, described), rest


def _matching(word: str, found: Iterable[tuple[str, str]]) -> Iterator[Completion]:
    for name, meta in found:
        if name.startswith(word):
            yield Completion(name, start_position=-len(word), display_meta=meta)


def _rest(
    options: tuple[Option, ...], flags: dict[str, Option], before: list[str]
) -> Option | None:
    """The option that takes the rest of the line, once the rest has begun."""
    rest = next((o for o in options if o.rest), None)
    if rest is None or "--" in before or _positionals(flags, before):
        return rest
    return None


def _positionals(flags: dict[str, Option], before: list[str]) -> int:
    """How many words are neither a flag nor the value of one."""
    given, skip = 0, False
    for word in before:
        if skip:
            skip = False
        elif word in flags:
            skip = flags[word].type != "bool"
        elif not word.startswith("-"):
            given += 1
    return given


def _next_positional(
    options: tuple[Option, ...], flags: dict[str, Option], before: list[str]
) -> Option | None:
    """The positional argument that the next word is."""
    given = _positionals(flags, before)
    positionals = [o for o in options if o.positional]
    for i, option in enumerate(positionals):
        if i == given or option.many or option.rest:
            return option
    return None


def _pids(known: Known) -> Iterator[tuple[str, str]]:
    for p in known.processes:
        label = " ".join(x for x in (p["program"], p["name"], p["state"], progress(p)) if x)
        yield str(p["pid"]), label
        if p["name"]:
            yield p["name"], f"{p['pid']} {p['program']} {p['state']}"


def _methods(known: Known) -> Iterator[tuple[str, str]]:
    for name, service in (known.manifest or {}).get("services", {}).items():
        for call, described in service.get("calls", {}).items():
            yield f"{name}.{call}", described["help"]
