"""`llmos chat`: talk with a model: program `chat`, turn by turn."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext

from llmos.shell import chats
from llmos.shell.chat import Conversation
from llmos.shell.chatinput import PipeReader, TerminalReader, quiet_keys
from llmos.shell.commands.program import COMMON, launch
from llmos.shell.context import Context
from llmos.shell.options import Command, Option, Usage, Values
from llmos.shell.render import count, fit, speed
from llmos.shell.resolve import schema_of
from llmos.shell.talk import (
    COMMANDS,
    LEAVE,
    SWITCHES,
    Reader,
    Talk,
    apply_settings,
    context_tokens,
    context_used,
)
from llmos.shell.textout import shows_markdown

WELCOME = "/? lists commands; Ctrl-C stops an answer, Ctrl-D leaves"
# No names of conversations and settings, but what may stand behind these commands.
_SHOWS = ("history", "model", "settings", "statistics", "system")


def run(ctx: Context, values: Values) -> int:
    saved = chats.load(ctx.home, values["load"]) if "load" in values else None
    if "model" not in values:
        if saved is None or not saved.model:
            raise Usage("MODEL is missing: the model to talk with", "`llmos models` lists them")
        values = {**values, "model": saved.model}
    if values.get("dry_run") or values.get("detach"):
        return launch(ctx, COMMAND.program, values)
    schema = schema_of(ctx.manifest() or {"programs": {}}, COMMAND.program)
    args = {f["name"]: values[f["name"]] for f in schema["args"] if f["name"] in values}
    common = {o.name for o in COMMON} - {"detach", "dry_run"} - set(args)
    options = {name: values[name] for name in common if name in values}
    options["cls"] = options.pop("class", "")
    options["hang_s"] = options.pop("hang_after", None)
    options["deadline_s"] = options.pop("deadline", 0.0)
    conversation = Conversation(ctx, schema, args, options)
    if saved is not None:
        apply_settings(conversation, saved, args)
    typed = sys.stdin.isatty()
    conversation.markdown = shows_markdown(ctx) and not values.get("plain")
    talk = Talk(ctx, conversation, PipeReader(), bool(values.get("stats")), stays=typed)
    if typed:
        talk.reader = terminal_reader(talk, keeps=bool(values.get("history", True)))
    with quiet_keys() if typed else nullcontext(), conversation:
        if typed:
            ctx.say(WELCOME)
        if saved is not None:
            conversation.replace(saved.messages)
            talk.loaded(values["load"], saved)
        talk.run()
    return 0


def terminal_reader(talk: Talk, keeps: bool) -> Reader:
    """The line editor of a conversation, which knows its commands and what it has used."""
    limit = context_tokens(talk.ctx.home, talk.conversation.args["model"])
    return TerminalReader(
        talk.ctx,
        lambda text: completions(talk, text),
        lambda columns: fit(toolbar(talk, limit), columns),
        keeps,
    )


def toolbar(talk: Talk, limit: int | None) -> str:
    """The model, how fast it was, and how much of its context the conversation takes."""
    conversation, last = talk.conversation, talk.conversation.last
    parts = [str(conversation.args["model"]).rstrip("/").rpartition("/")[2]]
    if last.get("tokens_per_s"):
        parts.append(f"{speed(last['tokens_per_s'])} tokens/s")
    used = context_used(last) if conversation.messages else 0
    if used or not conversation.messages:  # of a loaded one nobody knows before its next turn
        parts.append(f"context {count(used)}{f'/{count(limit)}' if limit else ''} tokens")
    parts += [talk.name] if talk.name else []
    return " " + " · ".join(parts)


def completions(talk: Talk, text: str) -> Iterator[tuple[str, str]]:
    """What can stand at the end of a line that is being typed, and what it means."""
    *before, word = text.split(" ")
    known: dict[str, str] = {}
    match before:
        case []:
            known = dict.fromkeys((*COMMANDS, *LEAVE), "") if word.startswith("/") else {}
        case ["/set"]:
            known = {name: o.help for name, o in talk.conversation.options().items()} | SWITCHES
        case ["/set", name] if name in SWITCHES:
            known = {"on": "", "off": ""}
        case ["/set", name] if name in talk.conversation.options():
            option = talk.conversation.options()[name]
            known = dict.fromkeys(
                option.choices or (("on", "off") if option.type == "bool" else ()), ""
            )
        case ["/load" | "/save"]:
            known = dict.fromkeys(chats.names(talk.ctx.home), "conversation")
        case ["/show"]:
            known = dict.fromkeys(_SHOWS, "")
    yield from ((name, meaning) for name, meaning in known.items() if name.startswith(word))


COMMAND = Command(
    name="chat",
    summary="Talk with a model; Ctrl-C stops an answer, Ctrl-D leaves",
    run=run,
    program="chat",
    optional=("model",),
    options=(
        Option("load", "go on with a conversation that `/save` has kept", metavar="NAME"),
        Option("plain", "show answers as they are, not as markdown", type="bool"),
        Option("history", "keep what is typed for the arrow keys of the next chat", type="bool",
               default=True),
        Option("stats", "print tokens and speed after each answer", type="bool", short="-v"),
    ),
    details="Lines that begin with / are commands: /? lists them. On a pipe each line is a turn. "
    "With --load a MODEL is only needed to go on with another one.",
)  # fmt: skip
