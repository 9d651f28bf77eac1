"""`llmos run`: continue a prompt with a model: program `infer`, attached."""

from __future__ import annotations

import sys

from llmos.shell.answers import JsonView
from llmos.shell.commands import chat
from llmos.shell.commands.program import launch
from llmos.shell.context import Context
from llmos.shell.options import JSON, Command, Option, Usage, Values
from llmos.shell.promptfiles import read_prompt
from llmos.shell.resolve import schema_of
from llmos.shell.textout import shows_markdown
from llmos.shell.view import View

# What stands in the place of a prompt.
_INSTEAD = ("messages", "prompt_ids")


def run(ctx: Context, values: Values) -> int:
    if values.get("stream") and not values.get("json"):
        raise Usage("--stream is for --json: text streams by itself")
    files = values.get("file", [])
    if any(name in values for name in _INSTEAD):
        if "prompt" in values or files:
            raise Usage(
                f"a prompt, or one of {', '.join('--' + n.replace('_', '-') for n in _INSTEAD)}"
            )
        return _launch(ctx, values)
    prompt = read_prompt(ctx, values.get("prompt"), files)
    if prompt is not None:
        return _launch(ctx, {**values, "prompt": prompt})
    if not sys.stdin.isatty():
        raise Usage("PROMPT is missing: the text to continue",
                    'llmos run MODEL "PROMPT", or give it on standard input')  # fmt: skip
    return _talk(ctx, values)


def _launch(ctx: Context, values: Values) -> int:
    def view(label: str) -> View:
        if values.get("json"):
            return JsonView(ctx, label, lines=bool(values.get("stream")), args=values)
        markdown = bool(values.get("markdown")) and shows_markdown(ctx)
        return View(ctx, label, stats=bool(values.get("stats")), markdown=markdown)

    return launch(ctx, COMMAND.program, values, view)


def _talk(ctx: Context, values: Values) -> int:
    """At a terminal and without a prompt it is a chat."""
    schema = schema_of(ctx.manifest() or {"programs": {}}, chat.COMMAND.program)
    known = {f["name"] for f in schema["args"]} | {o.name for o in chat.COMMAND.options}
    known |= {"name", "nice", "class", "device", "deadline", "restart", "hang_after"}
    strange = sorted(name for name in values if name not in known)
    if strange:
        flags = ", ".join("--" + name.replace("_", "-") for name in strange)
        raise Usage(f"PROMPT is missing: without one this is a chat, which takes no {flags}")
    return chat.run(ctx, values)


COMMAND = Command(
    name="run",
    summary="Continue a prompt with a model; the text streams to stdout",
    run=run,
    program="infer",
    optional=("prompt",),
    options=(
        Option("file", "read the prompt, or the rest of it, from FILE; - is standard input",
               type="list", short="-f", metavar="FILE", complete="path"),
        Option("json", JSON.help, type="bool"),
        Option("stream", "with --json: a line of JSON for each piece, as it is made", type="bool"),
        Option("markdown", "on a terminal: show headings, lists and code as such", type="bool"),
        Option("stats", "print tokens and speed to stderr at the end", type="bool", short="-v"),
    ),
    details="What is piped in, and files, follow the PROMPT after an empty line. Without any of "
    "them, or with -, standard input is the prompt; at a terminal it is a chat. Ctrl-C ends it.",
)  # fmt: skip
